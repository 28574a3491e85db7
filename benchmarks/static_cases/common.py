"""What the cases share: meta tensors of the shipped sizes, and names."""

from __future__ import annotations

import torch
from torch import Tensor

BATCH = 64  # so that strides and row counts are as large as in training
DTYPES = (torch.bfloat16, torch.float16)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def seed_for(p: float) -> Tensor | None:
    return empty(1, dtype=torch.int64) if p else None


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
