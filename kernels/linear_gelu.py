"""Products with GELU in their epilogue: x @ weight.T + bias forward, (grad @ weight) * GELU's slope backward.

A program walks over tiles of the (M, N) result, down the columns of a group of row tiles, so that programs
that run together share rows and weights in L2. Two programs fit on a multiprocessor: while one applies the
GELU to its tile, the tensor cores work on the other's. (One loop over tiles and depth, so that one program
does both, makes the compiler write the epilogue twice and keep its buffers beside those of the loads.) The
epilogue goes through a tile in quarters: in one piece its temporaries spill beside the 128 accumulators of
a thread.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.kernels.gelu import normal_density, normal_tail

RESIDENT = 2  # programs on a multiprocessor at a time


@triton.jit
def _locate(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row tile (int64) and column tile of a tile's number."""
    columns = tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * columns) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    within = tile % (GROUP * columns)
    return (first + within % height).to(tl.int64), within // height


@triton.jit
def _product(
    left_ptr, right_ptr, row_tile, column_tile, M, N, K, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 tile of left (M, K) @ right (K, N), or TRANSPOSED: right (N, K).T. EVEN: blocks divide N and K."""
    last = (M - 1 - row_tile * BLOCK_M).to(tl.int32)
    rows = tl.minimum(tl.arange(0, BLOCK_M), last)  # rows past M are not stored
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left = left_ptr + row_tile * BLOCK_M * K + (rows[:, None] * K + depth[None, :])
    if TRANSPOSED:
        right = right_ptr + (depth[:, None] + columns[None, :] * K)
    else:
        right = right_ptr + (depth[:, None] * N + columns[None, :])
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            left_tile, right_tile = tl.load(left), tl.load(right)
        else:
            left_tile = tl.load(left, mask=(start + depth < K)[None, :], other=0.0)
            mask = (start + depth < K)[:, None] & (columns < N)[None, :]
            right_tile = tl.load(right, mask=mask, other=0.0)
        product = tl.dot(left_tile, right_tile, product, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K if TRANSPOSED else BLOCK_K * N
    return product


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Left and right half of a tile (BLOCK_M, WIDTH)."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def _quarters(tile, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """The four quarters of a tile's columns, from left to right."""
    left, right = _halves(tile, BLOCK_M, WIDTH)
    first, second = _halves(left, BLOCK_M, WIDTH // 2)
    third, fourth = _halves(right, BLOCK_M, WIDTH // 2)
    return first, second, third, fourth


@triton.jit
def linear_gelu_kernel(
    x_ptr, weight_ptr, bias_ptr, hidden_ptr, activated_ptr, M, N, K, EVEN: tl.constexpr, EXACT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden = x (M, K) @ weight (N, K).T + bias (N,), rounded; activated = gelu(hidden)."""
    WIDTH: tl.constexpr = BLOCK_N // 4
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_tile, column_tile = _locate(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        product = _product(
            x_ptr, weight_ptr, row_tile, column_tile, M, N, K, True, EVEN, BLOCK_M, BLOCK_N, BLOCK_K
        )
        quarters = _quarters(product, BLOCK_M, BLOCK_N)
        rows, start = tl.arange(0, BLOCK_M), row_tile * BLOCK_M
        for quarter in tl.static_range(4):
            columns = column_tile * BLOCK_N + quarter * WIDTH + tl.arange(0, WIDTH)
            inside = (rows < M - start)[:, None] & (columns < N)[None, :]
            at = rows[:, None] * N + columns[None, :]
            bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
            hidden = (quarters[quarter] + bias[None, :]).to(activated_ptr.dtype.element_ty)
            if hidden_ptr is not None:
                tl.store(hidden_ptr + start * N + at, hidden, mask=inside)
            hidden = hidden.to(tl.float32)
            distance = tl.abs(hidden)
            activated = tl.maximum(hidden, 0.0) - distance * normal_tail(distance, EXACT)
            tl.store(activated_ptr + start * N + at, activated, mask=inside)


@triton.jit
def linear_gelu_backward_kernel(
    grad_ptr, weight_ptr, hidden_ptr, grad_hidden_ptr, activated_ptr, sums_ptr, M, N, K, EVEN: tl.constexpr,
    EXACT: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_hidden = (grad (M, K) @ weight (K, N)) * gelu'(hidden); its sums by row tile; gelu(hidden)."""
    WIDTH: tl.constexpr = BLOCK_N // 4
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_tile, column_tile = _locate(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        product = _product(
            grad_ptr, weight_ptr, row_tile, column_tile, M, N, K, False, EVEN, BLOCK_M, BLOCK_N, BLOCK_K
        )
        quarters = _quarters(product, BLOCK_M, BLOCK_N)
        rows, start = tl.arange(0, BLOCK_M), row_tile * BLOCK_M
        for quarter in tl.static_range(4):
            columns = column_tile * BLOCK_N + quarter * WIDTH + tl.arange(0, WIDTH)
            inside = (rows < M - start)[:, None] & (columns < N)[None, :]
            at = rows[:, None] * N + columns[None, :]
            hidden = tl.load(hidden_ptr + start * N + at, mask=inside, other=0.0).to(tl.float32)
            distance = tl.abs(hidden)
            tail = normal_tail(distance, EXACT)
            if activated_ptr is not None:
                activated = tl.maximum(hidden, 0.0) - distance * tail
                tl.store(activated_ptr + start * N + at, activated, mask=inside)
            slope = tail - distance * normal_density(distance)  # of -|hidden|; that of |hidden| is 1 - slope
            grad_hidden = quarters[quarter] * tl.where(hidden < 0, slope, 1 - slope)
            tl.store(grad_hidden_ptr + start * N + at, grad_hidden, mask=inside)
            if sums_ptr is not None:
                sums = tl.sum(tl.where((rows < M - start)[:, None], grad_hidden, 0.0), 0)
                tl.store(sums_ptr + row_tile * N + columns, sums, mask=columns < N)


@dataclass(frozen=True)
class Blocks:
    """How a product is cut into tiles, and the launch that goes with it."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def blocks(x: Tensor, columns: int) -> Blocks:
    """For x (M, K) times `columns` columns: 128 x 128 for tensor cores, less where the widths do not fit."""
    if x.dtype == torch.float32 or columns % 128 or x.shape[1] % 64:
        return SMALL
    return LARGE if runtime.capability(x.device)[0] in (9, 10) else MEDIUM


SMALL = Blocks(64, 64, 32, num_warps=4, num_stages=2)
MEDIUM = Blocks(128, 128, 32, num_warps=4, num_stages=4)  # 48 KiB of shared memory
LARGE = Blocks(128, 128, 64, num_warps=4, num_stages=3)  # 96 KiB


@functools.cache
def _constants(cut: Blocks, columns: int, depth: int, exact: bool) -> dict[str, Any]:
    """Shared, and so not to be changed."""
    even = columns % cut.BLOCK_N == 0 and depth % cut.BLOCK_K == 0
    return dict(EVEN=even, EXACT=exact, GROUP=8) | asdict(cut)  # GROUP: row tiles


def _launch(kernel: Any, cut: Blocks, columns: int, x: Tensor, *tensors: Tensor | None) -> None:
    rows, depth = x.shape
    tiles = -(-rows // cut.BLOCK_M) * -(-columns // cut.BLOCK_N)
    runtime.launch(
        kernel,
        (min(tiles, RESIDENT * runtime.multiprocessors(x.device)),),
        x,
        *tensors,
        rows,
        columns,
        depth,
        **_constants(cut, columns, depth, x.dtype == torch.float32),
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor, *, keep_hidden: bool) -> tuple[Tensor | None, Tensor]:
    """Product, bias and GELU.

    Args:
        x:           (M, K).
        weight:      (N, K) in x's dtype.
        bias:        (N,), any float dtype.
        keep_hidden: write `hidden`; else it is None.
    Returns:
        hidden = x @ weight.T + bias (M, N) and gelu(hidden) (M, N), both in x's dtype.
    """
    columns = weight.shape[0]
    activated = x.new_empty((x.shape[0], columns))
    hidden = torch.empty_like(activated) if keep_hidden else None
    tensors = (x.contiguous(), weight.contiguous(), bias.contiguous(), hidden, activated)
    _launch(linear_gelu_kernel, blocks(x, columns), columns, *tensors)
    return hidden, activated


def backward(
    grad: Tensor, weight: Tensor, hidden: Tensor, *, activated_wanted: bool, bias_wanted: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of `hidden` from that of gelu(hidden) @ weight.T.

    Args:
        grad:             (M, K).
        weight:           (K, N) in grad's dtype.
        hidden:           (M, N) as `forward` wrote it.
        activated_wanted: write gelu(hidden) again; else it is None.
        bias_wanted:      sum the gradient over rows; else the sum is None.
    Returns:
        gradient of hidden (M, N) and gelu(hidden) (M, N) in grad's dtype, gradient of the bias (N,) fp32.
    """
    columns, hidden = weight.shape[1], hidden.contiguous()
    grad_hidden = torch.empty_like(hidden)
    activated = torch.empty_like(hidden) if activated_wanted else None
    cut = blocks(grad, columns)
    row_tiles = -(-grad.shape[0] // cut.BLOCK_M)
    sums = grad.new_empty((row_tiles, columns), dtype=torch.float32) if bias_wanted else None
    tensors = (grad.contiguous(), weight.contiguous(), hidden, grad_hidden, activated, sums)
    _launch(linear_gelu_backward_kernel, cut, columns, *tensors)
    return grad_hidden, activated, None if sums is None else sums.sum(0)
