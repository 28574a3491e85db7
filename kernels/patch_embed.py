"""Patch embedding: pixels straight from the images to tokens.

A tile is some patches of one image by some columns of a token. A program keeps its columns and their weights
while it walks over images; where all patches are embedded it keeps their positions too. The program that has
the first patches of an image writes its cls row. Pixels of a patch are taken in the order in which they lie
in memory, and the weights with them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.kernels.rows import padded_width

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def split(pixel, P: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Colour, row and column of the pixels of a patch, which are numbered as they lie in memory."""
    if CHANNELS_LAST:
        colour, row, column = pixel % 3, pixel // (3 * P), pixel % (3 * P) // 3
    else:
        colour, row, column = pixel // (P * P), pixel % (P * P) // P, pixel % P
    return colour, row, column


@triton.jit
def load_pixels(
    images_ptr, image, patch, known, pixel, stride_b, STRIDES: tl.constexpr, P: tl.constexpr,
    ACROSS: tl.constexpr, CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Pixels (R, BLOCK_K) of patches (R,) of an image, fp32 in [-1, 1]; of no meaning where not `known`."""
    colour, row, column = split(pixel, P, CHANNELS_LAST)
    within = colour * STRIDES[0] + row * STRIDES[1] + column * STRIDES[2]
    if RUN > 1:
        within = tl.multiple_of(tl.max_contiguous(within, RUN), RUN)
    corner = patch // ACROSS * (P * STRIDES[1]) + patch % ACROSS * (P * STRIDES[2])
    at = images_ptr + image * stride_b + (corner[:, None] + within[None, :])
    tile = tl.load(at, mask=known[:, None] & (pixel < 3 * P * P)[None, :], other=0).to(tl.float32)
    if images_ptr.dtype.element_ty == tl.uint8:
        tile = tile * (1 / 127.5) - 1
    return tile


@triton.jit
def _load_weight(
    weight_ptr, pixel, column, D: tl.constexpr, P: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Weights (BLOCK_K, BLOCK_D) of these pixels and columns, 0 outside."""
    colour, row, x = split(pixel, P, CHANNELS_LAST)
    at = column[None, :] * (3 * P * P) + (colour * (P * P) + row * P + x)[:, None]
    mask = (pixel < 3 * P * P)[:, None] & (column < D)[None, :]
    return tl.load(weight_ptr + at, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def load_patch(ids_ptr, image, place, K: tl.constexpr, L: tl.constexpr):
    """Numbers of the patches at these places of an image's tokens, and whether there are such patches."""
    known = place < K
    if ids_ptr is None:
        patch = place
    else:
        number = tl.load(ids_ptr + image * K + place, mask=known, other=0)
        known &= (number >= 0) & (number < L)
        patch = tl.where(known, number, 0).to(tl.int32)
    return patch, known


@triton.jit
def patch_embed_kernel(
    images_ptr, ids_ptr, weight_ptr, bias_ptr, position_ptr, cls_ptr, out_ptr, batch, stride_b,
    STRIDES: tl.constexpr, P: tl.constexpr, ACROSS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    RUN: tl.constexpr, L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Tokens of K of the L patches of each image and its cls row, as rows (batch * (1 + K), D)."""
    column = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = tl.program_id(0) // BLOCKS % CHUNKS
    place = chunk * R + tl.arange(0, R)
    inside = column < D
    cls = tl.load(cls_ptr + column, mask=inside, other=0.0).to(tl.float32)
    cls += tl.load(position_ptr + column, mask=inside, other=0.0).to(tl.float32)
    position_ptr += D
    if ids_ptr is None:
        mask = (place < K)[:, None] & inside[None, :]
        added = tl.load(position_ptr + place[:, None] * D + column[None, :], mask=mask, other=0.0)
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        added = added.to(tl.float32) + bias[None, :]
    if BLOCK_K > 3 * P * P:
        weight = _load_weight(weight_ptr, tl.arange(0, BLOCK_K), column, D, P, CHANNELS_LAST, COMPUTE)
    step = tl.num_programs(0) // (BLOCKS * CHUNKS)
    for number in range(tl.program_id(0) // (BLOCKS * CHUNKS), batch, step):
        image = tl.cast(number, tl.int64)
        patch, known = load_patch(ids_ptr, image, place, K, L)
        if BLOCK_K > 3 * P * P:
            pixels = load_pixels(
                images_ptr, image, patch, known, tl.arange(0, BLOCK_K), stride_b, STRIDES, P, ACROSS,
                CHANNELS_LAST, RUN,
            )  # fmt: skip
            token = tl.dot(pixels.to(COMPUTE), weight, input_precision="ieee")
        else:
            token = tl.zeros((R, BLOCK_D), tl.float32)
            for start in range(0, 3 * P * P, BLOCK_K):
                pixel = start + tl.arange(0, BLOCK_K)
                pixels = load_pixels(
                    images_ptr, image, patch, known, pixel, stride_b, STRIDES, P, ACROSS, CHANNELS_LAST, RUN
                )
                weight = _load_weight(weight_ptr, pixel, column, D, P, CHANNELS_LAST, COMPUTE)
                token = tl.dot(pixels.to(COMPUTE), weight, token, input_precision="ieee")
        if ids_ptr is None:
            token += added
        else:
            mask = known[:, None] & inside[None, :]
            at = position_ptr + patch[:, None] * D + column[None, :]
            # Loaded here, since it would stay in registers over the loop.
            bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            token += tl.load(at, mask=mask, other=float("nan")).to(tl.float32) + bias[None, :]
        out = out_ptr + image * ((K + 1) * D)
        if chunk == 0:
            tl.store(out + column, cls.to(out_ptr.dtype.element_ty), mask=inside)
        at = out + (1 + place)[:, None] * D + column[None, :]
        tl.store(at, token.to(out_ptr.dtype.element_ty), mask=(place < K)[:, None] & inside[None, :])


@dataclass(frozen=True)
class Tiles:
    """Patches, columns and pixels of a tile, and the launch that goes with it.

    programs: per multiprocessor, as many as its registers hold at once.
    maxnreg:  of `runtime.launch`.
    """

    patches: int
    columns: int
    pixels: int
    programs: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None

    def workers(self, device: torch.device, shares: int) -> int:
        """Programs that walk over the images, for each of `shares` shares of the columns and patches."""
        return max(1, self.programs * runtime.multiprocessors(device) // shares)


# fp32 products have fewer than 64 rows: of more Triton makes TF32 products on sm_100.
EXACT = Tiles(32, 32, 16, programs=8, num_warps=4)


@functools.cache
def _forward_tiles(compute: torch.dtype) -> Tiles:
    if compute == torch.float32:
        return replace(EXACT, programs=5, maxnreg=runtime.registers(5, 4))
    return Tiles(64, 128, 64, programs=2, num_warps=8, num_stages=2)


def _run(strides: tuple[int, ...], size: int, patch: int, channels_last: bool) -> int:
    """Values of `size` bytes that can be loaded at a time: a power of two that divides a row of a patch."""
    colour, row, column = strides
    if column != (3 if channels_last else 1):
        return 1
    pixels = math.gcd(column * patch, row, 16 // size, *(() if channels_last else (colour,)))
    return pixels & -pixels


def geometry(
    images: Tensor, ids: Tensor | None, patch: int, width: int, tiles: Tiles
) -> tuple[Tensor, dict[str, Any]]:
    """Images as a (B, 3, height, width) view, and the constants that the two kernels share."""
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2)
    strides, (_, _, height, width_of_image) = images.stride()[1:], images.shape
    kept = None if ids is None else ids.shape[1]
    size = images.element_size()
    return images, _constants(strides, size, height, width_of_image, kept, patch, width, tiles)


@functools.cache
def _constants(
    strides: tuple[int, ...], size: int, height: int, across: int, kept: int | None, patch: int, width: int,
    tiles: Tiles,
) -> dict[str, Any]:  # fmt: skip
    """Of images `across` pixels wide, whose values have `size` bytes; shared, and so not to be changed."""
    across //= patch
    patches = height // patch * across
    kept = patches if kept is None else kept
    channels_last = strides[0] == 1
    rows = min(tiles.patches, padded_width(kept))
    return dict(
        STRIDES=strides,
        P=patch,
        ACROSS=across,
        CHANNELS_LAST=channels_last,
        RUN=_run(strides, size, patch, channels_last),
        L=patches,
        K=kept,
        D=width,
        R=rows,
        CHUNKS=-(-kept // rows),
        BLOCK_D=tiles.columns,  # in 16 bits no line of a tile is below 128 bytes: see benchmarks/wgmma.py
        BLOCKS=-(-width // tiles.columns),
        BLOCK_K=tiles.pixels,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.maxnreg,
    )


def forward(
    images: Tensor, ids: Tensor | None, weight: Tensor, bias: Tensor, position: Tensor, cls_token: Tensor,
    out: Tensor, compute: torch.dtype,
) -> None:  # fmt: skip
    """Write the tokens of a view into `out`.

    Args:
        images:    (B, 3, height, width) float or (B, height, width, 3) uint8.
        ids:       (B, K) int64, or None for all L patches in order.
        weight:    (D, 3, patch, patch).
        bias:      (D,).
        position:  (1, 1 + L, D).
        cls_token: (1, 1, D).
        out:       (B * (1 + K), D), contiguous.
        compute:   dtype of the product's factors.
    """
    tiles = _forward_tiles(compute)
    images, constants = geometry(images, ids, weight.shape[-1], len(weight), tiles)
    shares = constants["BLOCKS"] * constants["CHUNKS"]
    workers = min(tiles.workers(images.device, shares), len(images))
    runtime.launch(
        patch_embed_kernel, (workers * shares,),
        images, None if ids is None else ids.contiguous(), weight.contiguous(), bias.contiguous(),
        position.contiguous(), cls_token.contiguous(), out, len(images), images.stride(0),
        COMPUTE=TYPES[compute], **constants,
    )  # fmt: skip
