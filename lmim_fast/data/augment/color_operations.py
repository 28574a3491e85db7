"""PARSeq's colour operations on bytes, a row an image; they follow PIL and timm to the byte, or nearly.

All take and return (R, H, W, 3) uint8 tensors. They see the view, the literal ones the crop: extremes and
thresholds of a crop that is resized are not quite the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmim_fast.ops.photometric import LUMA


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel of each image to 0..255."""
    values = images.flatten(1, 2).float()
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    scale = 255.0 / (high - low).clamp_min_(1.0)
    stretched = ((values - low) * scale).floor_().clamp_(0.0, 255.0)
    return torch.where(high > low, stretched, values).byte().view_as(images)


def equalize(images: Tensor, pixels: Tensor) -> Tensor:
    """Give each channel of each image a flat histogram.

    PIL divides by a whole number that it takes from the count of pixels; few pixels stretch the histogram.

    Args:
        images: (R, H, W, 3) uint8.
        pixels: (R,) int64 of the crops in whose place the images stand: their counts are equalised.
    """
    values = images.flatten(1, 2).transpose(1, 2).long()  # (R, 3, pixels)
    counts = values.new_zeros((*values.shape[:2], 256)).scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(dim=2, keepdim=True))
    total, own = values.shape[2], pixels[:, None, None]
    step = (total - last) * own // total // 255
    before = (counts.cumsum(dim=2) - counts) * own // total
    table = ((step // 2 + before) // step.clamp_min(1)).clamp_(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.gather(2, values).byte().transpose(1, 2).reshape(images.shape)


def invert(images: Tensor) -> Tensor:
    """255 - value."""
    return 255 - images


def posterize(images: Tensor, bits: int) -> Tensor:
    """Keep the highest `bits` bits of each value, 0..8."""
    return images & (256 - 2 ** (8 - bits))


def solarize(images: Tensor, threshold: int) -> Tensor:
    """Invert values from `threshold` on."""
    return torch.where(images.int() >= threshold, 255 - images, images)


def solarize_add(images: Tensor, addition: int) -> Tensor:
    """Add to values below 128."""
    return torch.where(images < 128, (images.int() + addition).clamp_max_(255).byte(), images)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray image; factor (R,): 0 is gray, above 1 adds colour."""
    return _blend(_gray(images)[..., None], images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale about the mean gray of each image by factor (R,)."""
    mean = _gray(images).mean(dim=(1, 2), keepdim=True).add_(0.5).floor_()
    return _blend(mean[..., None], images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale by factor (R,)."""
    return _blend(torch.zeros((), device=images.device), images, factor)


def lay_over(images: Tensor, coverage: Tensor, fill: float) -> Tensor:
    """Show `fill` where coverage (R, H, W) uint8 is 0, the images where it is 255."""
    share = coverage[..., None] * (1.0 / 255.0)
    return ((images - fill) * share + fill).round_().byte()


def _gray(images: Tensor) -> Tensor:
    """(R, H, W) fp32, whole values."""
    red, green, blue = images.float().unbind(dim=3)
    return (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]).round_()


def _blend(start: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """start + factor * (images - start), rounded down as PIL does."""
    value = start + factor[:, None, None, None] * (images - start)
    return value.clamp_(0.0, 255.0).byte()
