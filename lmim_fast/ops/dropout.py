"""Dropout masks that kernels and eager forms draw alike: Philox bytes by (seed, sequence, row, column).

A decision takes one byte, so p is rounded to a multiple of 1/256 (0.1 becomes 26/256 = 0.1016) and the kept
values are scaled by the inverse of the rounded probability: the mean is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmim_fast.ops import philox


def check_probability(p: float) -> None:
    """Raise ValueError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")


def check(p: float, seed: Tensor | None) -> None:
    """Raise ValueError unless 0 <= p < 1 and the seed is None or a tensor of one int64."""
    check_probability(p)
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"seed must be one int64, got {seed.dtype} of shape {tuple(seed.shape)}")


def threshold(p: float) -> int:
    """Bytes below it are dropped: p in 256ths, 0 only where p is 0, at most 255."""
    return 0 if p == 0 else min(max(round(p * 256), 1), 255)


def scale(p: float) -> float:
    """Factor of the kept values: the inverse of the probability with which they are kept."""
    return 256 / (256 - threshold(p))


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int64 from torch's generator of the device; a CUDA graph draws a new one at each replay."""
    return torch.randint(2**63 - 1, (1,), device=device)


def settled_seed(p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed of a kernel's mask: None without dropout; drawn if none is given."""
    if p == 0:
        return None
    return draw_seed(device) if seed is None else seed


def keep_mask(seed: Tensor, sequences: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask that the kernels draw.

    Args:
        seed:      (1,) int64.
        sequences: (S,) int64 sequence numbers (for attention: sequence x heads + head; else 0).
        rows:      R, counted from 0.
        columns:   C, counted from 0.
        p:         dropout probability in [0, 1).
    Returns:
        (S, R, C) bool, True where the value is kept.
    """
    groups = -(-columns // 16)
    row = torch.arange(rows, device=sequences.device).repeat(len(sequences))
    words = philox.uint32(
        seed, sequences.repeat_interleave(rows), row, 4 * groups, philox.Stream.DROPOUT
    )  # (S * R, 4 * groups)
    shifts = torch.arange(0, 32, 8, device=words.device)
    drawn = (words[..., None] >> shifts & 255).view(len(sequences), rows, 16 * groups)
    return drawn[..., :columns] >= threshold(p)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout of (..., C) by the mask of `seed` over its flattened rows, or by torch's generator."""
    if p == 0:
        return x
    if seed is None:
        return torch.nn.functional.dropout(x, p)
    sequences = torch.zeros(1, dtype=torch.int64, device=x.device)
    keep = keep_mask(seed.to(x.device), sequences, x[..., 0].numel(), x.shape[-1], p).view(x.shape)
    return torch.where(keep, x * scale(p), 0.0).to(x.dtype)
