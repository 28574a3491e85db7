"""Bias, GELU and dropout over the rows of a matrix, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.kernels.dropout import keep_tile
from lmim_fast.kernels.rows import new_rows, tile_shape, with_stride

NUM_WARPS = 4
MAX_BLOCK = 512  # columns of a program; divides the hidden widths 1536, 2048 and 3072
FORWARD_TILE = 4096  # values: 32 a thread, so four 16-byte loads of bf16 are in flight
BACKWARD_TILE = 2048  # values: 16 a thread of both inputs
MOST_ROWS = 16  # of a tile, where rows are short
BACKWARD_PROGRAMS = 5  # per multiprocessor: as many as its registers hold at once with dropout
BACKWARD_STAGES = 3  # two tiles are loaded while one is worked on


@triton.jit
def normal_tail(distance, EXACT: tl.constexpr):
    """Probability that a normal variable exceeds `distance` >= 0 (fp32).

    EXACT: by erf, absolute error 1.5e-7. Else by a polynomial for its logarithm, whose relative error is
    below 8e-6 up to 6, where the tail is 1e-9, and which falls to 0 beyond; a thirtieth of the least by which
    fp16 rounds.
    """
    if EXACT:
        return 0.5 - 0.5 * tl.erf(distance * 0.7071067811865476)
    log = -1.83481134e-06 * distance + 6.15982865e-05
    log = log * distance - 9.30524740e-04
    log = log * distance + 8.50789026e-03
    log = log * distance - 5.39600671e-02
    log = log * distance - 4.58464396e-01
    log = log * distance - 1.15125104
    return tl.exp2(log * distance - 0.999995295)


@triton.jit
def normal_density(distance):
    """Density of a normal variable, as a power of 2; fp32."""
    return tl.exp2(distance * distance * -0.7213475204444817 - 1.3257480647361595)


@triton.jit
def _forward(
    x_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    x_stride,
    rows,
    F: tl.constexpr,
    THRESHOLD: tl.constexpr,
    EXACT: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0) % BLOCKS
    row = tl.program_id(0) // BLOCKS * R + tl.arange(0, R)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < F)[None, :]
    at = row.to(tl.int64)[:, None]
    bias = tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    x += bias[None, :]
    distance = tl.abs(x)
    out = tl.maximum(x, 0.0) - distance * normal_tail(distance, EXACT)
    if THRESHOLD > 0:
        group = block * (BLOCK // 16) + tl.arange(0, BLOCK // 16)
        keep = keep_tile(tl.load(seed_ptr), row, group, 0, THRESHOLD, R, BLOCK // 16)
        out = tl.where(keep, out * (256 / (256 - THRESHOLD)), 0.0)
    tl.store(out_ptr + at * F + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_ptr,
    x_ptr,
    bias_ptr,
    seed_ptr,
    grad_x_ptr,
    sums_ptr,
    activated_ptr,
    grad_stride,
    x_stride,
    rows,
    F: tl.constexpr,
    THRESHOLD: tl.constexpr,
    EXACT: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    block = tl.program_id(0) % BLOCKS
    part = tl.program_id(0) // BLOCKS
    parts = tl.num_programs(0) // BLOCKS
    column = block * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)
    total = tl.zeros((R, BLOCK), tl.float32)
    for tile in tl.range(part, tl.cdiv(rows, R), parts, num_stages=STAGES):
        row = tile * R + tl.arange(0, R)
        inside = (row < rows)[:, None] & (column < F)[None, :]
        at = row.to(tl.int64)[:, None]
        x = tl.load(x_ptr + at * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at * grad_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x += bias[None, :]
        distance = tl.abs(x)
        tail = normal_tail(distance, EXACT)
        activated = tl.maximum(x, 0.0) - distance * tail  # the bits of `_forward`
        slope = tail - distance * normal_density(distance)
        grad *= tl.where(x < 0, slope, 1 - slope)
        if THRESHOLD > 0:
            group = block * (BLOCK // 16) + tl.arange(0, BLOCK // 16)
            keep = keep_tile(tl.load(seed_ptr), row, group, 0, THRESHOLD, R, BLOCK // 16)
            grad = tl.where(keep, grad * (256 / (256 - THRESHOLD)), 0.0)
            activated = tl.where(keep, activated * (256 / (256 - THRESHOLD)), 0.0)
        if activated_ptr is not None:
            out = activated.to(activated_ptr.dtype.element_ty)
            tl.store(activated_ptr + at * F + column[None, :], out, mask=inside)
        tl.store(grad_x_ptr + at * F + column[None, :], grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if sums_ptr is not None:
            total += grad
    if sums_ptr is not None:
        tl.store(sums_ptr + part * F + column, tl.sum(total, axis=0), mask=column < F)


def forward(x: Tensor, bias: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """dropout(gelu(x + bias)).

    Args:
        x:         (..., F); fp32 takes the exact erf, bf16 and fp16 the cheaper form of `normal_tail`.
        bias:      (F,).
        seed:      (1,) int64 where threshold > 0.
        threshold: of dropout, in 256ths.
    Returns:
        (..., F) in x's dtype.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    out = new_rows(x, x.dtype)
    x, x_stride = with_stride(x)
    tile, block, blocks = tile_shape(width, FORWARD_TILE, MAX_BLOCK, MOST_ROWS)
    runtime.launch(
        _forward,
        (-(-rows // tile) * blocks,),
        x,
        bias.contiguous(),
        seed,
        out,
        x_stride,
        rows,
        num_warps=NUM_WARPS,
        F=width,
        THRESHOLD=threshold,
        EXACT=x.dtype == torch.float32,
        R=tile,
        BLOCK=block,
        BLOCKS=blocks,
    )
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    *,
    bias_wanted: bool,
    activated: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `forward`.

    Args:
        grad:        (..., F) of the result.
        x:           as in `forward`, and so bias, seed and threshold.
        bias_wanted: the gradient of the bias is wanted.
        activated:   (..., F) contiguous output in x's dtype, or None: the result of `forward` again.
        in_place:    the gradient of x takes the memory of grad, which is contiguous and of x's dtype.
    Returns:
        gradient of x (..., F) in its dtype; of the bias (F,) fp32, or None.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    grad_x = grad if in_place else new_rows(x, x.dtype)
    x, x_stride = with_stride(x)
    grad, grad_stride = with_stride(grad)
    tile, block, blocks = tile_shape(width, BACKWARD_TILE, MAX_BLOCK, MOST_ROWS)
    # On Blackwell ptxas would spill a few bytes to fit as many programs as there are without `activated`.
    crowded = activated is not None and runtime.capability(x.device)[0] == 10
    programs = min(4, BACKWARD_PROGRAMS) if crowded else BACKWARD_PROGRAMS
    most = max(1, programs * runtime.multiprocessors(x.device) // blocks)
    parts = min(-(-rows // tile), most)
    sums = x.new_empty((parts, width), dtype=torch.float32) if bias_wanted else None
    runtime.launch(
        _backward,
        (parts * blocks,),
        grad,
        x,
        bias.contiguous(),
        seed,
        grad_x,
        sums,
        activated,
        grad_stride,
        x_stride,
        rows,
        num_warps=NUM_WARPS,
        maxnreg=runtime.registers(programs, NUM_WARPS) if crowded else None,
        F=width,
        THRESHOLD=threshold,
        EXACT=x.dtype == torch.float32,
        R=tile,
        BLOCK=block,
        BLOCKS=blocks,
        STAGES=BACKWARD_STAGES,
    )
    return grad_x, None if sums is None else sums.sum(0)
