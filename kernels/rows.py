"""Tensors as rows of a matrix, for kernels that walk over rows."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """(..., D) as (rows, D) with columns side by side in memory; a copy only where it must be."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def new_rows(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous memory for a tensor of this shape and device."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def with_stride(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of (..., D) for a kernel, of any shape, and the distance from one to the next in memory."""
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    rows = as_rows(tensor)
    return rows, rows.stride(0)


@functools.cache
def padded_width(width: int) -> int:
    """The power of two that covers a row; at least a group of 16 columns, which shares a dropout draw."""
    return max(16, power_of_two(width))


@functools.cache
def power_of_two(count: int) -> int:
    """The smallest one that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


@functools.cache
def tile_shape(width: int, values: int, most_columns: int, most_rows: int) -> tuple[int, int, int]:
    """Rows and columns of a tile of at most so many values, and tiles side by side."""
    block = min(most_columns, padded_width(width))
    return min(most_rows, values // block), block, -(-width // block)


@functools.cache
def halved_tile(width: int, values: int, most_rows: int) -> tuple[int, int]:
    """Rows of a tile of at most so many values that holds whole rows, and columns of half a row."""
    padded = padded_width(width)
    return max(1, min(most_rows, values // padded)), padded // 2
