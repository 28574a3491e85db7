"""Rows of a table by number: gathered behind rows of an image, and their gradient summed for each number.

Forward a program takes the rows at one place in several images: their numbers rise, so that images near each
other read the same few rows of the table. Backward a program takes a few rows of the table and a part of the
images; the sums of the parts are added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import rows, runtime

NUM_WARPS = 4
MAX_BLOCK = 512  # columns of a program; divides the widths 512, 1024 and 1536
FORWARD_TILE = 4096  # values: 32 a thread, so four 16-byte loads of bf16 are in flight
BACKWARD_TILE = 2048
MOST_ROWS = 16  # of a tile, where rows are short
PROGRAMS = 6  # per multiprocessor, that sum
STAGES = 3  # two tiles are loaded while one is added
SEARCH_TILE = (16, 256)  # patches and places that are compared at once


@triton.jit
def gather_tile(table_ptr, number, known, column, least, most, stride, WIDTH: tl.constexpr):
    """Rows `number` (R,) of a table at `column` (BLOCK,); NaN where the number is not in [least, most)."""
    at = number.to(tl.int64)[:, None] * stride + column[None, :]
    known = known & (number >= least) & (number < most)
    return tl.load(table_ptr + at, mask=known[:, None] & (column < WIDTH)[None, :], other=float("nan"))


@triton.jit
def _append_rows(
    shown_ptr,
    table_ptr,
    ids_ptr,
    out_ptr,
    image_stride,
    row_stride,
    table_stride,
    images,
    shown,
    appended,
    patches,
    F: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    tiles = tl.cdiv(images, R)
    row = (tl.program_id(0) // BLOCKS // tiles).to(tl.int64)
    image = tl.program_id(0) // BLOCKS % tiles * R + tl.arange(0, R)
    known, image = image < images, image.to(tl.int64)
    inside = known[:, None] & (column < F)[None, :]
    if row < shown:
        at = (image * image_stride + row * row_stride)[:, None] + column[None, :]
        value = tl.load(shown_ptr + at, mask=inside)
    else:
        patch = tl.load(ids_ptr + image * appended + row - shown, mask=known, other=0)
        value = gather_tile(table_ptr, patch, known, column, 0, patches, table_stride, F)
    tl.store(out_ptr + (image * (shown + appended) + row)[:, None] * F + column[None, :], value, mask=inside)


@triton.jit
def _invert(ids_ptr, places_ptr, count, patches, P: tl.constexpr, BLOCK: tl.constexpr):
    """Where each patch stands among an image's ids; -1 where it does not."""
    tiles = tl.cdiv(patches, P)
    image = tl.program_id(0) // tiles
    patch = tl.program_id(0) % tiles * P + tl.arange(0, P)
    found = tl.full((P,), -1, tl.int32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        number = tl.load(ids_ptr + image * count + place, mask=place < count, other=-1).to(tl.int32)
        equal = number[None, :] == patch[:, None]
        found = tl.maximum(found, tl.max(tl.where(equal, place[None, :], -1), axis=1))
    tl.store(places_ptr + image * patches + patch, found, mask=patch < patches)


@triton.jit
def _sum_table(
    grad_ptr,
    places_ptr,
    sums_ptr,
    image_stride,
    row_stride,
    images,
    patches,
    F: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    tiles = tl.cdiv(patches, P)
    patch = tl.program_id(0) // BLOCKS % tiles * P + tl.arange(0, P)
    part = tl.program_id(0) // BLOCKS // tiles
    total = tl.zeros((P, BLOCK), tl.float32)
    for image in tl.range(part, images, tl.num_programs(0) // BLOCKS // tiles, num_stages=STAGES):
        place = tl.load(places_ptr + image * patches + patch, mask=patch < patches, other=-1)
        here = (place >= 0)[:, None] & (column < F)[None, :]
        row = tl.zeros((P,), tl.int64) + image
        at = (row * image_stride + place.to(tl.int64) * row_stride)[:, None] + column[None, :]
        total += tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float32)
    out_at = (part * patches + patch)[:, None] * F + column[None, :]
    tl.store(sums_ptr + out_at, total, mask=(patch < patches)[:, None] & (column < F)[None, :])


def append_rows(shown: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """(B, S + M, F): rows `shown` (B, S, F), behind them the rows `ids` (B, M) int64 of `table` (L, F)."""
    (images, appended), (patches, width), count = ids.shape, table.shape, shown.shape[1]
    out = table.new_empty((images, count + appended, width))
    shown, table = side_by_side(shown), side_by_side(table)
    tile, block, blocks = tile_shape(width, FORWARD_TILE)
    runtime.launch(
        _append_rows,
        (-(-images // tile) * (count + appended) * blocks,),
        shown,
        table,
        ids.contiguous(),
        out,
        shown.stride(0),
        shown.stride(1),
        table.stride(0),
        images,
        count,
        appended,
        patches,
        num_warps=NUM_WARPS,
        F=width,
        R=tile,
        BLOCK=block,
        BLOCKS=blocks,
    )
    return out


def table_gradient(grad: Tensor, ids: Tensor, patches: int) -> Tensor:
    """Sum of the rows (B, M, F) of `grad` by their patch `ids` (B, M) int64, fp32 (patches, F)."""
    (images, count, width), device = grad.shape, grad.device
    grad = side_by_side(grad)
    places = grad.new_empty((images, patches), dtype=torch.int32)
    searched, together = SEARCH_TILE
    runtime.launch(
        _invert,
        (images * -(-patches // searched),),
        ids.contiguous(),
        places,
        count,
        patches,
        num_warps=NUM_WARPS,
        P=searched,
        BLOCK=together,
    )
    tile, block, blocks = tile_shape(width, BACKWARD_TILE)
    tiles = -(-patches // tile) * blocks
    parts = max(1, min(images, PROGRAMS * runtime.multiprocessors(device) // max(1, tiles)))
    sums = grad.new_empty((parts, patches, width), dtype=torch.float32)
    runtime.launch(
        _sum_table,
        (parts * tiles,),
        grad,
        places,
        sums,
        grad.stride(0),
        grad.stride(1),
        images,
        patches,
        num_warps=NUM_WARPS,
        F=width,
        P=tile,
        BLOCK=block,
        BLOCKS=blocks,
        STAGES=STAGES,
    )
    return sums.sum(0)


def tile_shape(width: int, size: int) -> tuple[int, int, int]:
    """Rows and columns of a tile of at most `size` values, and tiles side by side."""
    return rows.tile_shape(width, size, MAX_BLOCK, MOST_ROWS)


def side_by_side(tensor: Tensor) -> Tensor:
    """Rows with their columns side by side in memory; a copy only where it must be."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
