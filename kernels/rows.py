"""Tensors as rows of a matrix, for kernels that walk over rows."""

from __future__ import annotations

import triton
from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """(..., D) as (rows, D) with columns side by side in memory; a copy only where it must be."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def padded_width(width: int) -> int:
    """The power of two that covers a row; at least a group of 16 columns, which shares a dropout draw."""
    return max(16, triton.next_power_of_2(width))
