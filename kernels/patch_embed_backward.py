"""Gradients of the patch embedding's parameters, in one pass over the tokens' gradient.

A program keeps some columns' sums in registers while it walks over tiles: some patches of one image. The
number of a patch's pixels is never a power of two, and a column of the tile beyond them is set to 1: its
product with the gradient is the gradient of the bias.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.kernels.patch_embed import EXACT, TYPES, Tiles, geometry, load_patch, load_pixels, split
from lmim_fast.kernels.rows import as_rows


@triton.jit
def patch_embed_backward_kernel(
    grad_ptr, images_ptr, ids_ptr, sums_ptr, batch, grad_stride, stride_b, STRIDES: tl.constexpr,
    P: tl.constexpr, ACROSS: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr,
    L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    ONES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Each row of sums: gradients of weight (D, 3, P, P), bias (D,) and cls (D,) from some of the tiles.

    ONES: the gradient's dtype is that of the product, which can then sum it for the bias.
    """
    column = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(0) // BLOCKS % PARTS
    worker = tl.program_id(0) // (BLOCKS * PARTS)
    pixel = part * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = column < D
    weight_sum = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    bias_sum = tl.zeros((BLOCK_D,), tl.float32)
    cls_sum = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(worker, batch * CHUNKS, tl.num_programs(0) // (BLOCKS * PARTS)):
        image = tl.cast(tile // CHUNKS, tl.int64)
        place = tile % CHUNKS * R + tl.arange(0, R)
        rows = grad_ptr + image * (K + 1) * grad_stride
        at = rows + (1 + place)[:, None].to(tl.int64) * grad_stride + column[None, :]
        grad = tl.load(at, mask=(place < K)[:, None] & inside[None, :], other=0.0)
        patch, known = load_patch(ids_ptr, image, place, K, L)
        pixels = load_pixels(
            images_ptr, image, patch, known, pixel, stride_b, STRIDES, P, ACROSS, CHANNELS_LAST, RUN
        )
        if ONES:
            pixels = tl.where((pixel == 3 * P * P)[None, :], 1.0, pixels)
        else:
            bias_sum += tl.sum(grad.to(tl.float32), 0)
        grad = tl.trans(grad.to(COMPUTE))
        weight_sum = tl.dot(grad, pixels.to(COMPUTE), weight_sum, input_precision="ieee")
        if tile % CHUNKS == 0:
            cls_sum += tl.load(rows + column, mask=inside, other=0.0).to(tl.float32)
    colour, row, x = split(pixel, P, CHANNELS_LAST)
    sums_ptr += worker.to(tl.int64) * ((3 * P * P + 2) * D)
    at = column[:, None] * (3 * P * P) + (colour * (P * P) + row * P + x)[None, :]
    if ONES:
        bias_at = tl.broadcast_to(3 * P * P * D + column[:, None], at.shape)
        at = tl.where((pixel == 3 * P * P)[None, :], bias_at, at)
        mask = inside[:, None] & (pixel <= 3 * P * P)[None, :]
    else:
        mask = inside[:, None] & (pixel < 3 * P * P)[None, :]
    tl.store(sums_ptr + at, weight_sum, mask=mask)
    if part == 0:  # a branch: the interpreter of Triton 3.9 refuses masks that mix tiles and single numbers
        tl.store(sums_ptr + (3 * P * P + 1) * D + column, cls_sum, mask=inside)
        if not ONES:
            tl.store(sums_ptr + 3 * P * P * D + column, bias_sum, mask=inside)


@functools.cache
def _tiles(grad: torch.dtype, compute: torch.dtype, capability: tuple[int, int]) -> Tiles:
    if compute == torch.float32:
        return EXACT
    stages = 2 if grad == torch.float32 else 3
    # On Blackwell Triton 3.6 would spill a few bytes to fit four programs.
    maxnreg = runtime.registers(2, 8) if capability[0] == 10 else None
    return Tiles(64, 128, 64, programs=2, num_warps=8, num_stages=stages, maxnreg=maxnreg)


def backward(
    grad: Tensor, views: list[tuple[Tensor, Tensor | None]], patch: int, compute: torch.dtype
) -> Tensor:
    """Gradients of the parameters.

    Args:
        grad:    (rows, D) of all views' tokens, view after view.
        views:   images and ids, as in `patch_embed.forward`.
        patch:   pixels of a patch's side.
        compute: as in `patch_embed.forward`.
    Returns:
        (D * (3 * patch * patch + 2),) fp32: gradients of weight (D, 3, patch, patch), bias (D,) and cls (D,).
    """
    grad = as_rows(grad)
    width, values = grad.shape[1], 3 * patch * patch
    tiles = _tiles(grad.dtype, compute, runtime.capability(grad.device))
    launches: list[tuple[Tensor, Tensor | None, int, int, dict[str, Any]]] = []
    for images, ids in views:
        images, constants = geometry(images, ids, patch, width, tiles)
        parts = -(-values // constants["BLOCK_K"])
        shares = constants["BLOCKS"] * parts
        workers = min(tiles.workers(grad.device, shares), len(images) * constants["CHUNKS"])
        ones = grad.dtype == compute and values % constants["BLOCK_K"] != 0
        constants = constants | dict(PARTS=parts, ONES=ones)
        launches.append((images, ids, workers, shares, constants))
    rows = sum(workers for _, _, workers, _, _ in launches)
    sums = grad.new_empty((rows, (values + 2) * width), dtype=torch.float32)
    token = row = 0
    for images, ids, workers, shares, constants in launches:
        runtime.launch(
            patch_embed_backward_kernel, (workers * shares,),
            grad[token:], images, None if ids is None else ids.contiguous(), sums[row:], len(images),
            grad.stride(0), images.stride(0), COMPUTE=TYPES[compute], **constants,
        )  # fmt: skip
        token += len(images) * (1 + constants["K"])
        row += workers
    return sums.sum(0)
