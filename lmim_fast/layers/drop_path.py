"""Stochastic depth over packed rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmim_fast.ops.attention import Segment


def drop_path(branch: Tensor, segments: Sequence[Segment], p: float) -> Tensor:
    """Drop the branch of a whole sequence with probability p, and scale that of the others by 1 / (1 - p).

    Args:
        branch:   (rows, D), with its bias.
        segments: (sequences, tokens) of each group of rows.
        p:        probability in [0, 1).
    Returns:
        (rows, D) in the branch's dtype.
    Source: Huang et al. 2016; per sample as in timm's DropPath.
    """
    scales = []
    for sequences, tokens in segments:
        kept = torch.rand(sequences, 1, device=branch.device) >= p
        scales.append((kept / (1 - p)).expand(-1, tokens).flatten())
    scale = scales[0] if len(scales) == 1 else torch.cat(scales)
    return (branch * scale[:, None]).to(branch.dtype)
