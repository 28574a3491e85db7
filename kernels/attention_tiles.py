"""What both passes of attention share: loads and stores of tiles, and the masks over keys."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def factor(dim: int) -> float:
    """What scores are multiplied with for heads of this width."""
    return float(dim**-0.5)


@triton.jit
def load_tile(ptr, rows, stride: tl.constexpr, limit: tl.constexpr, whole: tl.constexpr, D: tl.constexpr):
    """Rows (R,) of a (limit, D) matrix as (R, D), zero outside; `whole`: all rows are inside."""
    at = ptr + rows[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(at) if whole else tl.load(at, mask=rows[:, None] < limit, other=0.0)


@triton.jit
def seen_keys(lengths_ptr, number, M: tl.constexpr):
    """How many keys sequence `number` sees, 0 to M. Callers have None where all are seen."""
    return tl.minimum(tl.maximum(tl.load(lengths_ptr + number), 0), M).to(tl.int32)


@triton.jit
def load_keys(
    ptr, rows, stride: tl.constexpr, seen, limit: tl.constexpr, whole: tl.constexpr, D: tl.constexpr
):
    """As `load_tile`, with zeros for the keys that are not seen: their memory may contain anything."""
    if seen is None:
        return load_tile(ptr, rows, stride, limit, whole, D)
    else:
        at = ptr + rows[:, None] * stride + tl.arange(0, D)[None, :]
        return tl.load(at, mask=rows[:, None] < seen, other=0.0)


@triton.jit
def hide(scores, columns, rows, seen, CAUSAL: tl.constexpr):
    """Scores without those that a mask hides; `columns` and `rows` are key and query of each, broadcast.

    A sequence that sees no key keeps its first one, which is zeros: a softmax needs one finite score.
    """
    if CAUSAL:
        scores = tl.where(columns <= rows, scores, float("-inf"))
    if seen is not None:
        scores = tl.where(columns < tl.maximum(seen, 1), scores, float("-inf"))
    return scores


@triton.jit
def load_row(ptr, D: tl.constexpr):
    """D values as (D,) fp32; zeros where ptr is None."""
    return tl.zeros([D], tl.float32) if ptr is None else tl.load(ptr + tl.arange(0, D)).to(tl.float32)


@triton.jit
def store_tile(
    ptr, tile, rows, stride: tl.constexpr, limit: tl.constexpr, whole: tl.constexpr, D: tl.constexpr
):
    """The inverse of `load_tile`, in the pointer's type."""
    at = ptr + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tile = tile.to(ptr.dtype.element_ty)
    if whole:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=rows[:, None] < limit)
