"""Colours of both views in one launch: a program is one view of one image.

The contrast turns around the mean gray of the whole image. Where the image is one block of pixels, the
colours wait for it in registers; a larger image is coloured twice, for the mean and for the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.kernels.rows import power_of_two

MOST_PIXELS = 4096  # of a block: 24 registers a thread hold its colours; the size of a word crop
MANY_PIXELS = 2048  # of a block of a larger image, which is worked on block by block
WARP_PIXELS = 256  # 8 pixels a thread
MOST_WARPS = 16
RED, GREEN, BLUE = tl.constexpr(0.299), tl.constexpr(0.587), tl.constexpr(0.114)  # ops.photometric.LUMA


@triton.jit
def _byte(word, number: tl.constexpr):
    return (word >> (8 * number)) & 255


@triton.jit
def _in_order(first, second, third, fourth):
    """Bytes of each four pixels, (Q,) each, to (4 Q,) fp32."""
    pixels = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pixels, (4 * first.shape[0],)).to(tl.float32)


@triton.jit
def _colors(image_ptr, image, start, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Colours of a block of pixels of an image, (BLOCK,) fp32 each, from bytes or from words of four."""
    if image_ptr.dtype.element_ty == tl.int32:
        quad = start // 4 + tl.arange(0, BLOCK // 4)
        at = image_ptr + image * (3 * PIXELS // 4) + quad * 3
        one = tl.load(at, mask=quad < PIXELS // 4, other=0)
        two = tl.load(at + 1, mask=quad < PIXELS // 4, other=0)
        three = tl.load(at + 2, mask=quad < PIXELS // 4, other=0)
        red = _in_order(_byte(one, 0), _byte(one, 3), _byte(two, 2), _byte(three, 1))
        green = _in_order(_byte(one, 1), _byte(two, 0), _byte(two, 3), _byte(three, 2))
        blue = _in_order(_byte(one, 2), _byte(two, 1), _byte(three, 0), _byte(three, 3))
    else:
        pixel = start + tl.arange(0, BLOCK)
        at = image_ptr + image * (3 * PIXELS) + pixel * 3
        red = tl.load(at, mask=pixel < PIXELS, other=0).to(tl.float32)
        green = tl.load(at + 1, mask=pixel < PIXELS, other=0).to(tl.float32)
        blue = tl.load(at + 2, mask=pixel < PIXELS, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _clamp(value):
    return tl.minimum(tl.maximum(value, 0.0), 255.0)


@triton.jit
def _row(row_ptr, red, green, blue):
    """One result of an affine map, clamped; in the order in which the eager form adds."""
    value = tl.load(row_ptr) * red + tl.load(row_ptr + 1) * green + tl.load(row_ptr + 2) * blue
    return _clamp(value + tl.load(row_ptr + 3))


@triton.jit
def _affine(matrix_ptr, red, green, blue):
    """The (3, 4) map at matrix_ptr."""
    new_red = _row(matrix_ptr, red, green, blue)
    new_green = _row(matrix_ptr + 4, red, green, blue)
    return new_red, new_green, _row(matrix_ptr + 8, red, green, blue)


@triton.jit
def _solarize(value, threshold, above):
    return tl.where((value >= threshold) == above, 255.0 - value, value)


@triton.jit
def _cover(value, border, share):
    return (value - border) * share + border


@triton.jit
def _contrast(value, mean, factor):
    return _clamp((value - mean) * factor + mean)


@triton.jit
def _store(view_ptr, image, start, red, green, blue, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Normalised colours of a block of pixels into the planes (3, PIXELS) of a view."""
    kind = view_ptr.dtype.element_ty
    pixel = start + tl.arange(0, BLOCK)
    at = view_ptr + image * (3 * PIXELS) + pixel
    tl.store(at, (red * (1 / 127.5) - 1.0).to(kind), mask=pixel < PIXELS)
    tl.store(at + PIXELS, (green * (1 / 127.5) - 1.0).to(kind), mask=pixel < PIXELS)
    tl.store(at + 2 * PIXELS, (blue * (1 / 127.5) - 1.0).to(kind), mask=pixel < PIXELS)


@triton.jit
def _before_contrast(
    warped_ptr, before_ptr, threshold_ptr, above_ptr, after_ptr, coverage_ptr, border_ptr, image, start,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Colours of a block of pixels after all operations up to the contrast, and their gray, 0 outside."""
    red, green, blue = _colors(warped_ptr, image, start, PIXELS, BLOCK)
    red, green, blue = _affine(before_ptr + image * 12, red, green, blue)
    threshold, above = tl.load(threshold_ptr + image), tl.load(above_ptr + image) != 0
    red = _solarize(red, threshold, above)
    green = _solarize(green, threshold, above)
    blue = _solarize(blue, threshold, above)
    red, green, blue = _affine(after_ptr + image * 12, red, green, blue)
    pixel = start + tl.arange(0, BLOCK)
    covered = tl.load(coverage_ptr + image * PIXELS + pixel, mask=pixel < PIXELS, other=0)
    share = covered.to(tl.float32) * (1 / 255)
    red = _cover(red, tl.load(border_ptr + image * 3), share)
    green = _cover(green, tl.load(border_ptr + image * 3 + 1), share)
    blue = _cover(blue, tl.load(border_ptr + image * 3 + 2), share)
    return red, green, blue, tl.where(pixel < PIXELS, red * RED + green * GREEN + blue * BLUE, 0.0)


@triton.jit
def _finish(
    view_ptr, contrast_ptr, final_ptr, image, start, red, green, blue, mean,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Contrast around `mean`, the final map, and the store."""
    factor = tl.load(contrast_ptr + image)
    red = _contrast(red, mean, factor)
    green = _contrast(green, mean, factor)
    blue = _contrast(blue, mean, factor)
    red, green, blue = _affine(final_ptr + image * 12, red, green, blue)
    _store(view_ptr, image, start, red, green, blue, PIXELS, BLOCK)


@triton.jit
def _photometric(
    plain_ptr, warped_ptr, before_ptr, threshold_ptr, above_ptr, after_ptr, coverage_ptr, border_ptr,
    contrast_ptr, final_ptr, plain_view_ptr, guidance_view_ptr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        for start in range(0, PIXELS, BLOCK):
            red, green, blue = _colors(plain_ptr, image, start, PIXELS, BLOCK)
            _store(plain_view_ptr, image, start, red, green, blue, PIXELS, BLOCK)
    else:
        if warped_ptr is not None:
            red, green, blue, gray = _before_contrast(
                warped_ptr, before_ptr, threshold_ptr, above_ptr, after_ptr, coverage_ptr, border_ptr,
                image, 0, PIXELS, BLOCK,
            )  # fmt: skip
            if BLOCK >= PIXELS:
                mean = tl.sum(gray) * (1 / PIXELS)
                _finish(
                    guidance_view_ptr, contrast_ptr, final_ptr, image, 0, red, green, blue, mean,
                    PIXELS, BLOCK,
                )  # fmt: skip
            else:
                for start in range(BLOCK, PIXELS, BLOCK):
                    red, green, blue, more = _before_contrast(
                        warped_ptr, before_ptr, threshold_ptr, above_ptr, after_ptr, coverage_ptr, border_ptr,
                        image, start, PIXELS, BLOCK,
                    )  # fmt: skip
                    gray += more
                mean = tl.sum(gray) * (1 / PIXELS)
                for start in range(0, PIXELS, BLOCK):
                    red, green, blue, more = _before_contrast(
                        warped_ptr, before_ptr, threshold_ptr, above_ptr, after_ptr, coverage_ptr, border_ptr,
                        image, start, PIXELS, BLOCK,
                    )  # fmt: skip
                    _finish(
                        guidance_view_ptr, contrast_ptr, final_ptr, image, start, red, green, blue, mean,
                        PIXELS, BLOCK,
                    )  # fmt: skip


def forward(
    plain: Tensor, warped: Tensor | None, program: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Normalised plain views, and coloured guidance views.

    Args:
        plain:   (B, H, W, 3) uint8, contiguous, at an address that is a multiple of 4.
        warped:  likewise, or None.
        program: where there is `warped`, fields of `ops.photometric.ColorProgram` in its order.
        dtype:   of the views.
    Returns:
        plain views (B, 3, H, W); guidance views, None where `warped` is.
    """
    batch, height, width, _ = plain.shape
    pixels = height * width
    views = [
        plain.new_empty((batch, 3, height, width), dtype=dtype) for _ in range(1 if warped is None else 2)
    ]
    guidance = None if warped is None else views[1]
    block = max(4, power_of_two(pixels))
    block = block if block <= MOST_PIXELS else MANY_PIXELS
    fields: list[Tensor | None] = [None] * 8
    if warped is not None:
        fields = [field.contiguous() for field in program]
    runtime.launch(
        _photometric,
        (batch if pixels else 0, len(views)),
        _words(plain),
        None if warped is None else _words(warped),
        *fields,
        views[0],
        guidance,
        num_warps=max(1, min(MOST_WARPS, block // WARP_PIXELS)),
        PIXELS=pixels,
        BLOCK=block,
    )
    return views[0], guidance


def _words(images: Tensor) -> Tensor:
    """The bytes as int32 where an image has whole words of them: a quarter of the loads."""
    whole = images[:1].numel() % 4 == 0
    return images.reshape(-1).view(torch.int32) if whole else images
