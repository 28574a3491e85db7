"""The least time an operation can take: from its shapes, and from what the machine reaches.

Each input is read once and each output written once; nothing an implementation keeps for itself between the
passes (masks, softmax statistics) is counted, nor are random numbers. A stage takes at least
max(bytes / copy bandwidth, FLOPs / GEMM rate, exponentials / exponential rate); an operation is one stage,
or several where a product's result has to pass through memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a stage has to move and to compute; FLOPs are those of products, 2 a multiply-add."""

    bytes: float
    flops: float = 0.0
    exponentials: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.bytes + other.bytes, self.flops + other.flops, self.exponentials + other.exponentials
        )


@dataclass(frozen=True)
class Ceilings:
    """Rates a second; `exponentials` is None where they are not known to bind."""

    bandwidth: float
    flops: float
    exponentials: float | None = None


def floor_seconds(stages: Iterable[Work], ceilings: Ceilings) -> float:
    """Sum over the stages of the largest of their times."""
    total = 0.0
    for work in stages:
        times = [work.bytes / ceilings.bandwidth, work.flops / ceilings.flops]
        if ceilings.exponentials is not None:
            times.append(work.exponentials / ceilings.exponentials)
        total += max(times)
    return total


def total(stages: Iterable[Work]) -> Work:
    """All stages together."""
    return sum(stages, Work(0.0))


@dataclass(frozen=True)
class Passes:
    """Stages of the forward and of the backward pass."""

    forward: tuple[Work, ...]
    backward: tuple[Work, ...]

    def of(self, direction: str) -> tuple[Work, ...]:
        """Stages of "forward", or of "forward+backward"."""
        return self.forward if direction == "forward" else self.forward + self.backward


def attention(batch: int, queries: int, keys: int, width: int, heads: int, itemsize: int) -> Passes:
    """Multi-head attention of (B, N, D) queries over (B, M, D) keys and values.

    The backward pass makes the weights again: 5 products to the forward's 2, and the exponentials once more.
    It reads the context too, for the row sums of context x gradient.
    """
    query_bytes = batch * queries * width * itemsize
    memory_bytes = 2 * batch * keys * width * itemsize
    flops = 4.0 * batch * queries * keys * width
    exponentials = float(batch * heads * queries * keys)
    forward = Work(2 * query_bytes + memory_bytes, flops, exponentials)
    backward = Work(4 * query_bytes + 2 * memory_bytes, 2.5 * flops, exponentials)
    return Passes((forward,), (backward,))


def dropout_add_layer_norm(
    rows: int, width: int, itemsize: int, residual_itemsize: int, dropout: bool
) -> Passes:
    """Branch and residual in, normalised and new residual out.

    Backward: both gradients and the residual in; the residual's gradient out, and the branch's where it is
    not the same tensor (dropout, or another dtype).
    """
    cells, both = rows * width, itemsize + residual_itemsize
    own = itemsize if dropout or itemsize != residual_itemsize else 0
    forward = Work(float(2 * cells * both))
    return Passes((forward,), (Work(float(cells * (both + 2 * residual_itemsize + own))),))


def layer_norm(rows: int, width: int, itemsize: int, input_itemsize: int) -> Passes:
    """Input in, normalised out; backward: gradient and input in, gradient out."""
    cells = rows * width
    forward = Work(float(cells * (itemsize + input_itemsize)))
    return Passes((forward,), (Work(float(cells * (itemsize + 2 * input_itemsize))),))


def bias_gelu(rows: int, width: int, itemsize: int) -> Passes:
    """Product in, activation out; backward: gradient and product in, gradient out."""
    tensor = float(rows * width * itemsize)
    return Passes((Work(2 * tensor),), (Work(3 * tensor),))


def linear(rows: int, inputs: int, outputs: int, itemsize: int) -> Passes:
    """Rows and weight in, product out; backward: two products as large, with the weight and with the rows."""
    moved = float((rows * (inputs + outputs) + inputs * outputs) * itemsize)
    work = Work(moved, 2.0 * rows * inputs * outputs)
    return Passes((work,), (work, work))


def mlp(rows: int, width: int, hidden: int, itemsize: int, training: bool) -> Passes:
    """gelu(x @ w1.T + b1) @ w2.T with the hidden rows in memory once, and once more before GELU if training.

    Backward: the product with w2 (GELU's derivative in its epilogue), that with w1, and both weights'.
    """
    narrow, wide = float(rows * width * itemsize), float(rows * hidden * itemsize)
    weight, flops = float(width * hidden * itemsize), 2.0 * rows * width * hidden
    forward = (
        Work(narrow + weight + wide * (2 if training else 1), flops),
        Work(wide + weight + narrow, flops),
    )
    through = Work(narrow + weight + 2 * wide, flops)
    plain = Work(narrow + weight + wide, flops)
    return Passes(forward, (through, plain, plain, plain))


def photometric(images: int, pixels: int, itemsize: int, guidance: bool) -> Passes:
    """Three bytes a pixel in, three values out; the guidance view likewise, and its coverage in."""
    view = float(images * pixels * 3 * (1 + itemsize))
    return Passes((Work(2 * view + images * pixels if guidance else view),), ())


def decoder_tokens(batch: int, shown: int, masked: int, width: int, itemsize: int) -> Passes:
    """Visible rows in, all tokens out; backward: their gradient in, the visible rows' out."""
    few, all_ = float(batch * shown * width * itemsize), float(batch * (shown + masked) * width * itemsize)
    return Passes((Work(few + all_),), (Work(all_ + few),))


def append_table_rows(batch: int, shown: int, masked: int, width: int, itemsize: int) -> Passes:
    """As `decoder_tokens`: the table is small beside the rows."""
    return decoder_tokens(batch, shown, masked, width, itemsize)


def masked_feature_loss(rows: int, width: int, itemsize: int, training: bool) -> Passes:
    """Product and teacher rows in; the product's gradient out if training, so that backward has no work."""
    return Passes((Work(float((3 if training else 2) * rows * width * itemsize)),), ())


def select_patches(batch: int, patches: int) -> Passes:
    """fp32 noise in, int64 ids out: far less than a launch takes."""
    return Passes((Work(float(batch * patches * (4 + 8))),), ())


def draw_patches(batch: int, patches: int) -> Passes:
    """Sample indices and epochs in, int64 ids out: far less than a launch takes."""
    return Passes((Work(float(batch * 8 * (2 + patches))),), ())


def patch_embed(
    images: int, kept: int, width: int, pixels: int, pixel_itemsize: int, itemsize: int
) -> Passes:
    """Values of the kept patches in, their tokens and cls out; backward: tokens' gradient and values in."""
    moved = float(images * (kept * pixels * pixel_itemsize + (1 + kept) * width * itemsize))
    work = Work(moved, 2.0 * images * kept * pixels * width)
    return Passes((work,), (work,))
