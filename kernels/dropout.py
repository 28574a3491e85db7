"""Dropout masks from Philox counters, 16 decisions a call: one byte each, keep where byte >= threshold.

The counter is (group of 16 columns, row, sequence, DROPOUT), the key is the seed; so a mask does not depend
on how a kernel cuts its rows and columns. `lmim_fast.ops.dropout.keep_mask` is the same in plain PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl

DROPOUT = tl.constexpr(4)  # lmim_fast.ops.philox.Stream.DROPOUT


@triton.jit
def _decide(words, threshold: tl.constexpr):
    """(..., 4) uint32 words of a call to (..., 4, 4) decisions; each byte is shifted to the top."""
    shifts = (24 - 8 * tl.arange(0, 4)).to(tl.uint32)
    return (tl.expand_dims(words, -1) << shifts) >= (threshold << 24)


@triton.jit
def _words(seed, row, group, sequence):
    """The four words of each call, in order, in a last dimension of (2, 2)."""
    zero = row * 0
    first, second, third, fourth = tl.philox(
        seed,
        group.to(tl.uint32),
        row.to(tl.uint32),
        (zero + sequence).to(tl.uint32),
        (zero + DROPOUT).to(tl.uint32),
    )
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def keep_tile(seed, rows, groups, sequence, threshold: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Mask of a tile.

    rows (R,) and groups (G,) int32: row numbers, numbers of column groups (column // 16); sequence: a number.
    Returns (R, 16 * G) bool, columns in order.
    """
    row, group = tl.broadcast(rows[:, None], groups[None, :])
    words = tl.reshape(_words(seed, row, group, sequence), (R, G, 4))
    return tl.reshape(_decide(words, threshold), (R, 16 * G))


@triton.jit
def keep_tile_transposed(
    seed, rows, groups, sequence, threshold: tl.constexpr, R: tl.constexpr, G: tl.constexpr
):
    """The tile of `keep_tile` with its columns first: (16 * G, R) bool."""
    row, group = tl.broadcast(rows[None, :], groups[:, None])
    words = tl.reshape(_words(seed, row, group, sequence), (G, R, 4))
    return tl.reshape(tl.permute(_decide(words, threshold), (0, 2, 3, 1)), (16 * G, R))


@triton.jit
def keep_column(seed, rows, column: tl.constexpr, sequence, threshold: tl.constexpr):
    """The mask of one column at these rows: (R,) bool."""
    first, second, third, fourth = tl.philox(
        seed,
        (rows * 0 + column // 16).to(tl.uint32),
        rows.to(tl.uint32),
        (rows * 0 + sequence).to(tl.uint32),
        (rows * 0 + DROPOUT).to(tl.uint32),
    )
    word: tl.constexpr = column % 16 // 4
    if word == 0:
        chosen = first
    elif word == 1:
        chosen = second
    elif word == 2:
        chosen = third
    else:
        chosen = fourth
    return (chosen << (24 - column % 4 * 8)) >= (threshold << 24)
