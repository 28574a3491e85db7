"""Squared error of masked rows against teacher features or pixels, with its gradient, in one pass.

A tile is (2, rows, half a row), as in `norm`: so a warp can hold whole rows of up to 512 columns, and few
numbers pass between warps. A few programs per multiprocessor take tile after tile and keep their sums in
registers, to be added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.kernels.rows import halved_tile, with_stride

TILE = 2048  # values: 16 a thread, two 16-byte loads of each bf16 input
NUM_WARPS = 4
MOST_ROWS = 16  # of a tile, where rows are short
PROGRAMS = 3  # per multiprocessor: as many as its registers hold at once
STAGES = 3  # two tiles are loaded while one is worked on
SCALED_TILE = 4096  # values of a program of `scale`
SCALING_PROGRAMS = 8  # per multiprocessor: few, for they often have nothing to do


@triton.jit
def _row_sum(tile):
    """(2, R, HALF) to (1, R, 1); the long sum first: Triton 3.6 puts the halves into different warps."""
    return tl.sum(tl.sum(tile, axis=2), axis=0)[None, :, None]


@triton.jit
def _target_at(
    image, patch, column, image_stride, line_stride, pixel_stride, colour_stride, across, PATCH: tl.constexpr
):
    """Offsets (2, R, HALF) of target values: a patch's pixels, or a token's features where PATCH is 0."""
    if PATCH == 0:
        at = image * image_stride + (patch + 1) * line_stride + column * pixel_stride
    else:
        line = patch // across * PATCH + column // (3 * PATCH)
        pixel = patch % across * PATCH + column % (3 * PATCH) // 3
        at = image * image_stride + line * line_stride + pixel * pixel_stride + column % 3 * colour_stride
    return at


@triton.jit
def _forward(
    product_ptr,
    bias_ptr,
    source_ptr,
    ids_ptr,
    gradient_ptr,
    bias_sums_ptr,
    squares_ptr,
    product_stride,
    image_stride,
    line_stride,
    pixel_stride,
    colour_stride,
    across,
    patches,
    masked,
    rows,
    eps,
    mean_scale,
    gradient_scale,
    D: tl.constexpr,
    PATCH: tl.constexpr,
    FREEDOM: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = (tl.arange(0, 2) * HALF)[:, None, None] + tl.arange(0, HALF)[None, None, :]
    squares = tl.zeros((2, R, HALF), tl.float32)
    bias_sum = tl.zeros((2, R, HALF), tl.float32)
    if bias_ptr is not None:
        every = tl.broadcast_to(column, (2, R, HALF))  # each thread loads what it uses
        bias = tl.load(bias_ptr + every, mask=every < D, other=0.0).to(tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        row = tile * R + tl.arange(0, R)
        inside = (row < rows)[None, :, None] & (column < D)
        at = row.to(tl.int64)[None, :, None]
        image = (row // masked).to(tl.int64)[None, :, None]
        patch = tl.load(ids_ptr + row, mask=row < rows, other=0)[None, :, None]
        known = inside & (patch >= 0) & (patch < patches)
        source_at = _target_at(
            image, patch, column, image_stride, line_stride, pixel_stride, colour_stride, across, PATCH
        )
        source = tl.load(source_ptr + source_at, mask=known, other=0)
        error = tl.load(product_ptr + at * product_stride + column, mask=inside, other=0.0).to(tl.float32)
        target = source.to(tl.float32)
        if source_ptr.dtype.element_ty == tl.uint8:
            target = tl.where(column < D, target * (1 / 127.5) - 1.0, 0.0)
        if FREEDOM > 0:
            centred = tl.where(column < D, target - _row_sum(target) * (1 / D), 0.0)
            target = centred * tl.rsqrt(_row_sum(centred * centred) * (1 / FREEDOM) + eps)
        if bias_ptr is not None:
            error += bias
        error = tl.where(known, error - target, float("nan"))  # a patch that is not there
        error = tl.where(inside, error, 0.0)
        squares += error * error
        if gradient_ptr is not None:
            gradient = (error * gradient_scale).to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + at * D + column, gradient, mask=inside)
        if bias_sums_ptr is not None:
            bias_sum += error
    total = tl.sum(tl.sum(tl.sum(squares, axis=2), axis=1), axis=0)
    tl.store(squares_ptr + tl.program_id(0), total * mean_scale)
    if bias_sums_ptr is not None:
        sums = tl.sum(bias_sum, axis=1, keep_dims=True) * (2 * mean_scale)
        tl.store(bias_sums_ptr + tl.program_id(0) * D + column, sums, mask=column < D)


@triton.jit
def _scale(gradient_ptr, upstream_ptr, out_ptr, factor, size, BLOCK: tl.constexpr):
    scale = tl.load(upstream_ptr).to(tl.float32) * factor
    for tile in tl.range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at = (tl.zeros((BLOCK,), tl.int64) + tile) * BLOCK + tl.arange(0, BLOCK)
        gradient = tl.load(gradient_ptr + at, mask=at < size, other=0.0).to(tl.float32) * scale
        tl.store(out_ptr + at, gradient.to(out_ptr.dtype.element_ty), mask=at < size)


def features_forward(
    product: Tensor,
    bias: Tensor | None,
    features: Tensor,
    ids_masked: Tensor,
    eps: float,
    *,
    gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean squared error of product + bias against the normalised features of the tokens ids_masked + 1.

    Args:
        product:       (B, M, D).
        bias:          (D,) or None.
        features:      (B, 1 + L, D).
        ids_masked:    (B, M) int64.
        eps:           added to the variance.
        gradient:      that of product is wanted.
        bias_gradient: that of bias is wanted.
    Returns:
        loss () fp32; the gradient of product (B, M, D) in its dtype, to be multiplied by `scale`, or
        None; the gradient of bias (D,) fp32, or None.
    """
    batch_stride, token_stride, column_stride = features.stride()
    return _launch_forward(
        product,
        bias,
        features,
        ids_masked,
        (batch_stride, token_stride, column_stride, 0),
        (1, features.shape[1] - 1),
        eps,
        patch_size=0,
        freedom=product.shape[2],
        gradient=gradient,
        bias_gradient=bias_gradient,
    )


def pixels_forward(
    product: Tensor,
    bias: Tensor | None,
    images: Tensor,
    ids_masked: Tensor,
    patch_size: int,
    *,
    normalise: bool,
    gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `features_forward`, against the pixels of the patches `ids_masked`, ordered line, pixel, colour.

    Args:
        images:     uint8 (B, height, width, 3) or float (B, 3, height, width).
        patch_size: side in pixels.
        normalise:  each patch to mean 0 and unbiased variance 1, eps 1e-6.
    """
    layout = (0, 1, 2, 3) if images.dtype == torch.uint8 else (0, 2, 3, 1)
    strides = images.stride()
    _, height, width, _ = (images.shape[dimension] for dimension in layout)
    across = width // patch_size
    return _launch_forward(
        product,
        bias,
        images,
        ids_masked,
        tuple(strides[dimension] for dimension in layout),
        (across, height // patch_size * across),
        1e-6,
        patch_size=patch_size,
        freedom=3 * patch_size**2 - 1 if normalise else 0,
        gradient=gradient,
        bias_gradient=bias_gradient,
    )


def _launch_forward(
    product: Tensor,
    bias: Tensor | None,
    source: Tensor,
    ids_masked: Tensor,
    strides: tuple[int, ...],
    grid: tuple[int, int],
    eps: float,
    *,
    patch_size: int,
    freedom: int,
    gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`freedom` divides the squares of a target row to give its variance; 0 leaves the target as it is."""
    (_, masked, width), device = product.shape, product.device
    out = torch.empty(product.shape, dtype=product.dtype, device=device) if gradient else None
    mean = 1 / product.numel()
    kept = 2 * mean / _pending_factor(product)
    rows = product.numel() // width
    product, product_stride = with_stride(product)
    tile, half = halved_tile(width, TILE, MOST_ROWS)
    programs = min(-(-rows // tile), PROGRAMS * runtime.multiprocessors(device))
    bias_sums = product.new_empty((programs, width), dtype=torch.float32) if bias_gradient else None
    squares = product.new_empty((programs,), dtype=torch.float32)
    runtime.launch(
        _forward,
        (programs,),
        product,
        None if bias is None else bias.contiguous(),
        source,
        ids_masked.contiguous(),
        out,
        bias_sums,
        squares,
        product_stride,
        *strides,
        *grid,
        masked,
        rows,
        eps,
        mean,
        kept,
        num_warps=NUM_WARPS,
        maxnreg=runtime.registers(PROGRAMS, NUM_WARPS),
        D=width,
        PATCH=patch_size,
        FREEDOM=freedom,
        R=tile,
        HALF=half,
        STAGES=STAGES,
    )
    return squares.sum(), out, None if bias_sums is None else bias_sums.sum(0)


def _pending_factor(product: Tensor) -> float:
    """What `scale` brings in fp16: with it the gradient would vanish before it meets the loss scale."""
    return 2 / product.numel() if product.dtype == torch.float16 else 1.0


def scale(gradient: Tensor, upstream: Tensor) -> Tensor:
    """What the forward pass keeps of the gradient of product, times all that is still to come.

    Args:
        gradient: contiguous.
        upstream: one number, on the same device; it is not read on the host.
    """
    out = torch.empty_like(gradient)
    tiles = -(-gradient.numel() // SCALED_TILE)
    runtime.launch(
        _scale,
        (min(tiles, SCALING_PROGRAMS * runtime.multiprocessors(gradient.device)),),
        gradient,
        upstream,
        out,
        _pending_factor(gradient),
        gradient.numel(),
        num_warps=NUM_WARPS,
        BLOCK=SCALED_TILE,
    )
    return out
