"""Dropout, residual add and LayerNorm: one pass over the rows forward, one backward.

A tile is (2, rows, half a row): so a warp can hold whole rows of up to 512 columns, or halves of them, and
few numbers pass between warps. Forward a program takes one tile; backward a few programs per multiprocessor
take tile after tile and keep column sums in registers, to be added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.kernels.dropout import keep_tile
from lmim_fast.kernels.rows import halved_tile, new_rows, with_stride

TILE = 2048  # values: 16 a thread, two 16-byte loads of each bf16 input
NUM_WARPS = 4
MOST_ROWS = 16  # of a tile, where rows are short
BACKWARD_PROGRAMS = 3  # per multiprocessor: as many as its registers hold at once
BACKWARD_STAGES = 3  # two tiles are loaded while one is worked on


@triton.jit
def _row_mean(tile, D: tl.constexpr):
    """(2, R, HALF) to (R,); the long sum first: Triton 3.6 puts the halves into different warps."""
    return tl.sum(tl.sum(tile, axis=2), axis=0) * (1 / D)


@triton.jit
def _parameter(pointer, column, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr):
    """(D,) at columns (2, 1, HALF) as a tile (2, R, HALF), fp32, 0 beyond D.

    Loaded for each row, and so by the threads that use it: it need not pass between threads.
    """
    column = tl.broadcast_to(column, (2, R, HALF))
    return tl.load(pointer + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def _drop(tile, seed_ptr, row, THRESHOLD: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr):
    """Dropout of a tile (2, R, HALF); row (R,)."""
    keep = keep_tile(tl.load(seed_ptr), row, tl.arange(0, HALF // 8), 0, THRESHOLD, R, HALF // 8)
    keep = tl.permute(tl.reshape(keep, (R, 2, HALF)), (1, 0, 2))
    return tl.where(keep, tile * (256 / (256 - THRESHOLD)), 0.0)


@triton.jit
def _forward(
    x_ptr,
    x_bias_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    normalised_ptr,
    total_ptr,
    statistics_ptr,
    x_stride,
    residual_stride,
    rows,
    eps,
    D: tl.constexpr,
    THRESHOLD: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = (tl.arange(0, 2) * HALF)[:, None, None] + tl.arange(0, HALF)[None, None, :]
    inside = (row < rows)[None, :, None] & (column < D)
    at = row.to(tl.int64)[None, :, None]
    total = tl.load(residual_ptr + at * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    if x_ptr is not None:
        branch = tl.load(x_ptr + at * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if x_bias_ptr is not None:
            branch += _parameter(x_bias_ptr, column, D, R, HALF)
        if THRESHOLD > 0:
            branch = _drop(branch, seed_ptr, row, THRESHOLD, R, HALF)
        kept = (total + branch).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at * D + column, kept, mask=inside)
        total = kept.to(tl.float32)  # the statistics are those of the residual that is kept
    weight = _parameter(weight_ptr, column, D, R, HALF)
    bias = _parameter(bias_ptr, column, D, R, HALF)
    # Chosen, so that the difference below is from the mean as it is stored, and `_backward` can make the same
    # rows. Else the compiler fuses it with the product that made the mean, before that is rounded.
    mean = tl.where(row < rows, _row_mean(total, D), 0.0)
    centred = tl.where(column < D, total - mean[None, :, None], 0.0)
    deviation = tl.rsqrt(_row_mean(centred * centred, D) + eps)
    tl.store(statistics_ptr + row, mean, mask=row < rows)
    tl.store(statistics_ptr + rows + row, deviation, mask=row < rows)
    normalised = centred * deviation[None, :, None] * weight + bias
    tl.store(normalised_ptr + at * D + column, normalised.to(normalised_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "first"])
def _backward(
    grad_ptr,
    grad_total_ptr,
    total_ptr,
    weight_ptr,
    statistics_ptr,
    seed_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    sums_ptr,
    bias_ptr,
    normalised_ptr,
    more_ptr,
    most_ptr,
    grad_stride,
    grad_total_stride,
    total_stride,
    more_stride,
    most_stride,
    rows,
    tokens,
    first,
    D: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PARAMETERS: tl.constexpr,
    X_BIAS: tl.constexpr,
    SHIFTED: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = (tl.arange(0, 2) * HALF)[:, None, None] + tl.arange(0, HALF)[None, None, :]
    weight_sum = tl.zeros((2, R, HALF), tl.float32)
    bias_sum = tl.zeros((2, R, HALF), tl.float32)
    branch_sum = tl.zeros((2, R, HALF), tl.float32)
    if grad_ptr is not None:
        weight = _parameter(weight_ptr, column, D, R, HALF)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        row = tile * R + tl.arange(0, R)
        inside = (row < rows)[None, :, None] & (column < D)
        at = row.to(tl.int64)[None, :, None]
        change = tl.zeros((2, R, HALF), tl.float32)
        if grad_ptr is not None:
            grad = tl.load(grad_ptr + at * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
            if more_ptr is not None:
                more_at, more_inside = at, inside
                if SHIFTED:  # its rows are those from `first` on of each sequence
                    more_at = (row - (row // tokens + 1) * first).to(tl.int64)[None, :, None]
                    more_inside = inside & (row % tokens >= first)[None, :, None]
                more = tl.load(more_ptr + more_at * more_stride + column, mask=more_inside, other=0.0)
                grad += more.to(tl.float32)
                if most_ptr is not None:
                    most = tl.load(most_ptr + more_at * most_stride + column, mask=more_inside, other=0.0)
                    grad += most.to(tl.float32)
            total = tl.load(total_ptr + at * total_stride + column, mask=inside, other=0.0).to(tl.float32)
            mean = tl.load(statistics_ptr + row, mask=row < rows, other=0.0)[None, :, None]
            deviation = tl.load(statistics_ptr + rows + row, mask=row < rows, other=0.0)[None, :, None]
            # Outside, grad is 0, and so is all that is summed up.
            normal = (total - mean) * deviation
            if normalised_ptr is not None:
                bias = tl.zeros((2, R, HALF), tl.float32)  # over the loop it would not fit the registers
                if tile < tl.cdiv(rows, R):  # always: a load in a branch gets no buffers in shared memory
                    bias = _parameter(bias_ptr, column, D, R, HALF)
                # The same bits as in `_forward`: the same operations in the same order.
                normalised = (normal * weight + bias).to(normalised_ptr.dtype.element_ty)
                tl.store(normalised_ptr + at * D + column, normalised, mask=inside)
            if PARAMETERS:
                weight_sum += grad * normal
                bias_sum += grad
            scaled = grad * weight
            along = _row_mean(scaled * normal, D)[None, :, None]
            offset = _row_mean(scaled, D)[None, :, None]
            change = (scaled - offset - normal * along) * deviation
        if grad_total_ptr is not None:
            grad_total_at = at * grad_total_stride + column
            change += tl.load(grad_total_ptr + grad_total_at, mask=inside, other=0.0).to(tl.float32)
        out_at = at * D + column
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + out_at, change.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        if THRESHOLD > 0:
            change = _drop(change, seed_ptr, row, THRESHOLD, R, HALF)
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + out_at, change.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if X_BIAS:
            branch_sum += change
    sums_at = sums_ptr + tl.program_id(0) * D + column
    step = tl.num_programs(0) * D
    if PARAMETERS:
        tl.store(sums_at, tl.sum(weight_sum, axis=1, keep_dims=True), mask=column < D)
        tl.store(sums_at + step, tl.sum(bias_sum, axis=1, keep_dims=True), mask=column < D)
    if X_BIAS:
        sums_at += 2 * step if PARAMETERS else 0
        tl.store(sums_at, tl.sum(branch_sum, axis=1, keep_dims=True), mask=column < D)


def forward(
    x: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    threshold: int,
    dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """LayerNorm of residual + dropout(x + x_bias), or of the residual where x is None.

    Args:
        x:         (..., D) or None.
        x_bias:    (D,) or None.
        residual:  (..., D).
        weight:    (D,).
        bias:      (D,).
        seed:      (1,) int64 where threshold > 0.
        threshold: of dropout, in 256ths.
        dtype:     of the normalised rows.
        eps:       added to the variance.
    Returns:
        normalised (..., D) in `dtype`; the sum (..., D) in the residual's dtype, None where x is;
        statistics (2, rows) fp32: mean, inverse of the deviation.
    """
    width = residual.shape[-1]
    rows = residual.numel() // width
    normalised = new_rows(residual, dtype)
    total = None if x is None else new_rows(residual, residual.dtype)
    statistics = residual.new_empty((2, rows), dtype=torch.float32)
    residual, residual_stride = with_stride(residual)
    branch, branch_stride = (None, 0) if x is None else with_stride(x)
    tile, half = halved_tile(width, TILE, MOST_ROWS)
    runtime.launch(
        _forward,
        (-(-rows // tile),),
        branch,
        None if x_bias is None else x_bias.contiguous(),
        residual,
        weight.contiguous(),
        bias.contiguous(),
        seed,
        normalised,
        total,
        statistics,
        branch_stride,
        residual_stride,
        rows,
        eps,
        num_warps=NUM_WARPS,
        D=width,
        THRESHOLD=threshold,
        R=tile,
        HALF=half,
    )
    return normalised, total, statistics


def backward(
    grad: Tensor | None,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    threshold: int,
    *,
    x_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    parameters: bool,
    x_bias: bool,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    extra: Sequence[Tensor] = (),
    first: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of `forward`.

    Args:
        grad:           (..., D) of the normalised rows, or None.
        grad_total:     (..., D) of the sum, or None; one of the two is given.
        total:          (..., D) the sum.
        weight:         (D,).
        statistics:     (2, rows) from `forward`.
        seed:           as in `forward`.
        threshold:      as in `forward`.
        x_dtype:        of the gradient of x; None if it is not wanted.
        residual_dtype: of the gradient of the residual; None if it is not wanted.
        parameters:     the gradients of weight and bias are wanted; grad is given.
        x_bias:         the gradient of x_bias is wanted.
        rows:           (..., D) contiguous output, or None: the normalised rows again, as `forward` made them
                        for this dtype; grad and bias are given.
        bias:           (D,) as in `forward`; only `rows` needs it.
        extra:          up to two gradients (..., D) to be added to grad, which is given.
        first:          where it is above 0, those in extra are (B, N - first, D): of tokens first to N - 1
                        of a total (B, N, D).
    Returns:
        gradients of x and of the residual (..., D), or None;
        (k, D) fp32 gradients of weight, bias and x_bias, those that are wanted.
    Raises:
        ValueError: rows or extra without grad, rows without bias, or more in extra or of another shape.
    """
    if grad is None and (rows is not None or extra):
        raise ValueError("rows and extra need the gradient of the normalised rows, got None")
    if rows is not None and bias is None:
        raise ValueError("rows need the bias, got None")
    width, device = total.shape[-1], total.device
    tokens = total.shape[-2] if first else 0
    if extra:
        _check_extra(extra, total, first)
    count = total.numel() // width
    grad_x = None if x_dtype is None else new_rows(total, x_dtype)
    grad_residual = None if residual_dtype is None else new_rows(total, residual_dtype)
    total, total_stride = with_stride(total)
    grad, grad_stride = (None, 0) if grad is None else with_stride(grad)
    grad_total, grad_total_stride = (None, 0) if grad_total is None else with_stride(grad_total)
    more, more_stride = with_stride(extra[0]) if extra else (None, 0)
    most, most_stride = with_stride(extra[1]) if len(extra) > 1 else (None, 0)
    major = runtime.capability(device)[0]
    tile, half = halved_tile(width, TILE, MOST_ROWS)
    # One more would spill a few bytes: rows are made beside three sums, and fp32 takes more registers.
    crowded = rows is not None and x_bias and (total.dtype == torch.float32 or major == 10)
    resident = min(2, BACKWARD_PROGRAMS) if crowded else BACKWARD_PROGRAMS
    programs = min(-(-count // tile), resident * runtime.multiprocessors(device))
    sums = total.new_empty((2 * parameters + x_bias, programs, width), dtype=torch.float32)
    runtime.launch(
        _backward,
        (programs,),
        grad,
        grad_total,
        total,
        weight.contiguous(),
        statistics,
        seed,
        grad_x,
        grad_residual,
        sums,
        None if bias is None or rows is None else bias.contiguous(),
        rows,
        more,
        most,
        grad_stride,
        grad_total_stride,
        total_stride,
        more_stride,
        most_stride,
        count,
        tokens,
        first,
        num_warps=NUM_WARPS,
        maxnreg=runtime.registers(resident, NUM_WARPS),
        D=width,
        THRESHOLD=threshold,
        PARAMETERS=parameters,
        X_BIAS=x_bias,
        SHIFTED=first > 0,
        R=tile,
        HALF=half,
        STAGES=BACKWARD_STAGES,
    )
    return grad_x, grad_residual, sums.sum(1)


def _check_extra(extra: Sequence[Tensor], total: Tensor, first: int) -> None:
    """Raise ValueError unless `extra` is up to two gradients with a row for each token from `first` on."""
    expected = [*total.shape]
    if first:
        expected[-2] -= first
    if len(extra) > 2:
        raise ValueError(f"extra takes up to two gradients, got {len(extra)}")
    for grad in extra:
        if [*grad.shape] != expected or 0 in expected[-2:]:
            raise ValueError(f"extra {tuple(grad.shape)} must be {tuple(expected)} from token {first} on")
