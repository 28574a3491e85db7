"""Fixed 2-D sin-cos position tables."""

from __future__ import annotations

import torch
from torch import Tensor

from lmim_fast.config import ModelConfig


def position_table(width: int, config: ModelConfig) -> Tensor:
    """(1, 1 + L, width) fp32: half of the features for x, half for y, sin then cos; the cls row is zero.

    config.pos_grid "released" lays the patches out on a square grid, as the released checkpoints do.
    """
    columns = int(config.num_patches**0.5) if config.pos_grid == "released" else config.grid[1]
    patch = torch.arange(config.num_patches, dtype=torch.float64)
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    x = (patch % columns)[:, None] * frequency
    y = (patch // columns)[:, None] * frequency
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
    return torch.cat([table.new_zeros(1, width), table]).float()[None]
