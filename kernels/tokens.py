"""Decoder input: bias and positions on visible tokens, mask tokens behind them; forward and backward.

Forward a program takes one place in several images, as in `table_rows`. Backward few programs take tile after
tile and keep column sums in registers, to be added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.kernels.table_rows import (
    BACKWARD_TILE,
    FORWARD_TILE,
    NUM_WARPS,
    gather_tile,
    side_by_side,
    tile_shape,
)

PROGRAMS = 4  # per multiprocessor, that sum
STAGES = 3  # two tiles are loaded while one is added


@triton.jit
def _decoder_tokens(
    visible_ptr,
    bias_ptr,
    mask_token_ptr,
    position_ptr,
    ids_visible_ptr,
    ids_masked_ptr,
    out_ptr,
    image_stride,
    token_stride,
    position_stride,
    images,
    kept,
    masked,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    tiles = tl.cdiv(images, R)
    token = (tl.program_id(0) // BLOCKS // tiles).to(tl.int64)
    image = tl.program_id(0) // BLOCKS % tiles * R + tl.arange(0, R)
    known, image = image < images, image.to(tl.int64)
    inside = known[:, None] & (column < D)[None, :]
    if token <= kept:
        # cls has the row before the first. Triton 3.9's interpreter refuses `known & (token > 0)` as a mask.
        listed = image < tl.where(token > 0, images, 0)
        patch = tl.load(ids_visible_ptr + image * kept + token - 1, mask=listed, other=-1)
        added = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    else:
        patch = tl.load(ids_masked_ptr + image * masked + token - kept - 1, mask=known, other=0)
        added = tl.load(mask_token_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    least = tl.where(token > 0, 1, 0)
    place = gather_tile(position_ptr, patch + 1, known, column, least, 1 + kept + masked, position_stride, D)
    value = place.to(tl.float32) + added[None, :]
    if token <= kept:
        at = (image * image_stride + token * token_stride)[:, None] + column[None, :]
        value += tl.load(visible_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out_at = (image * (1 + kept + masked) + token)[:, None] * D + column[None, :]
    tl.store(out_ptr + out_at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _decoder_tokens_backward(
    grad_ptr,
    grad_shown_ptr,
    grad_visible_ptr,
    sums_ptr,
    image_stride,
    token_stride,
    shown_image_stride,
    shown_token_stride,
    images,
    shown,
    tokens,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(0) // BLOCKS
    parts = tl.num_programs(0) // BLOCKS
    shown_sum = tl.zeros((R, BLOCK), tl.float32)
    masked_sum = tl.zeros((R, BLOCK), tl.float32)
    for tile in tl.range(part, tl.cdiv(images * tokens, R), parts, num_stages=STAGES):
        row = tile * R + tl.arange(0, R)
        inside = (row < images * tokens)[:, None] & (column < D)[None, :]
        image, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
        at = (image * image_stride + token * token_stride)[:, None] + column[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        own = (token < shown)[:, None]
        if grad_shown_ptr is not None:
            shown_at = (image * shown_image_stride + token * shown_token_stride)[:, None] + column[None, :]
            grad += tl.load(grad_shown_ptr + shown_at, mask=inside & own, other=0.0).to(tl.float32)
        if grad_visible_ptr is not None:
            out_at = (image * shown + token)[:, None] * D + column[None, :]
            out = grad.to(grad_visible_ptr.dtype.element_ty)
            tl.store(grad_visible_ptr + out_at, out, mask=inside & own)
        shown_sum += tl.where(own, grad, 0.0)
        masked_sum += tl.where(own, 0.0, grad)
    sums_at = sums_ptr + part * D + column
    tl.store(sums_at, tl.sum(shown_sum, axis=0), mask=column < D)
    tl.store(sums_at + parts * D, tl.sum(masked_sum, axis=0), mask=column < D)


def decoder_tokens(
    visible: Tensor,
    bias: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_visible: Tensor,
    ids_masked: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Decoder input: bias and positions on the visible tokens, and behind them the mask tokens.

    Args:
        visible:     (B, 1 + K, D), cls first.
        bias:        (D,).
        mask_token:  (1, 1, D).
        position:    (1, 1 + K + M, D).
        ids_visible: (B, K) int64.
        ids_masked:  (B, M) int64.
        dtype:       of the result.
    Returns:
        (B, 1 + K + M, D).
    """
    (images, kept), masked, width = ids_visible.shape, ids_masked.shape[1], visible.shape[2]
    out = visible.new_empty((images, 1 + kept + masked, width), dtype=dtype)
    visible, position = side_by_side(visible), side_by_side(position)
    tile, block, blocks = tile_shape(width, FORWARD_TILE)
    runtime.launch(
        _decoder_tokens,
        (-(-images // tile) * (1 + kept + masked) * blocks,),
        visible,
        bias.contiguous(),
        mask_token.contiguous(),
        position,
        ids_visible.contiguous(),
        ids_masked.contiguous(),
        out,
        visible.stride(0),
        visible.stride(1),
        position.stride(1),
        images,
        kept,
        masked,
        num_warps=NUM_WARPS,
        D=width,
        R=tile,
        BLOCK=block,
        BLOCKS=blocks,
    )
    return out


def decoder_tokens_backward(
    grad: Tensor,
    shown: int,
    *,
    visible_dtype: torch.dtype | None,
    mask_token: bool,
    grad_shown: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of `decoder_tokens`.

    Args:
        grad:          (B, 1 + K + M, D) of the result.
        shown:         1 + K.
        visible_dtype: of the gradient of visible; None if it is not wanted.
        mask_token:    the gradient of mask_token is wanted; without it only the shown rows are read.
        grad_shown:    (B, 1 + K, D) a gradient to be added to that of the shown rows, or None.
    Returns:
        gradient of visible (B, 1 + K, D), or None;
        (2, D) fp32: gradients of bias and of mask_token, which is 0 if it is not wanted.
    Raises:
        ValueError: grad_shown has another shape.
    """
    (images, tokens, width), device = grad.shape, grad.device
    tokens = tokens if mask_token else shown
    grad_visible = None
    if visible_dtype is not None:
        grad_visible = grad.new_empty((images, shown, width), dtype=visible_dtype)
    grad = side_by_side(grad)
    if grad_shown is not None:
        if grad_shown.shape != (images, shown, width):
            raise ValueError(f"grad_shown {tuple(grad_shown.shape)} must be {(images, shown, width)}")
        grad_shown = side_by_side(grad_shown)
    tile, block, blocks = tile_shape(width, BACKWARD_TILE)
    most = max(1, PROGRAMS * runtime.multiprocessors(device) // blocks)
    parts = min(-(-images * tokens // tile), most)
    sums = grad.new_empty((2, parts, width), dtype=torch.float32)
    runtime.launch(
        _decoder_tokens_backward,
        (parts * blocks,),
        grad,
        grad_shown,
        grad_visible,
        sums,
        grad.stride(0),
        grad.stride(1),
        0 if grad_shown is None else grad_shown.stride(0),
        0 if grad_shown is None else grad_shown.stride(1),
        images,
        shown,
        tokens,
        num_warps=NUM_WARPS,
        maxnreg=None if grad_shown is None else runtime.registers(PROGRAMS, NUM_WARPS),
        D=width,
        R=tile,
        BLOCK=block,
        BLOCKS=blocks,
        STAGES=STAGES,
    )
    return grad_visible, sums.sum(1)
