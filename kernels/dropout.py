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
def keep_tile(seed, rows, groups, sequence, threshold: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Mask of a tile.

    rows (R,) and groups (G,) int32: row numbers, numbers of column groups (column // 16); sequence: a number.
    Returns (R, 16 * G) bool, columns in order.
    """
    row, group = tl.broadcast(rows[:, None], groups[None, :])
    zero = row * 0
    first, second, third, fourth = tl.philox(
        seed,
        group.to(tl.uint32),
        row.to(tl.uint32),
        (zero + sequence).to(tl.uint32),
        (zero + DROPOUT).to(tl.uint32),
    )
    words = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (R, G, 4))
    return tl.reshape(_decide(words, threshold), (R, 16 * G))
