"""Counter-based noise of views: the same numbers on every device, functions of (seed, epoch, index)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lmim_fast.ops.philox import Stream, uint32

_LEVELS = 2**16  # a 32-bit draw becomes two numbers


def add_gaussian(images: Tensor, deviation: Tensor, seed: int, epochs: Tensor, indices: Tensor) -> Tensor:
    """Add normal noise to every value, rounded to the nearest byte (the released code rounds down).

    Args:
        images:    (R, H, W, 3) uint8.
        deviation: (R,) fp32 standard deviation of the noise.
        seed:      the run's seed.
        epochs:    (R,) int64, on the device of `images`, as the rest.
        indices:   (R,) int64 sample indices.
    Returns:
        (R, H, W, 3) uint8.
    """
    normal = _normal_table().to(images.device)
    draws = _halves(seed, epochs, indices, images[0].numel())
    noise = normal[draws].view(images.shape) * deviation[:, None, None, None]
    return (images + noise).round_().clamp_(0.0, 255.0).byte()


def add_poisson(
    images: Tensor, rate: Tensor, share: Tensor, seed: int, epochs: Tensor, indices: Tensor
) -> Tensor:
    """Add Poisson noise of random sign, one number for the three colours of a pixel.

    Args:
        images:  (R, H, W, 3) uint8.
        rate:    (R,) fp32 mean of the Poisson distribution, at most 100.
        share:   (R,) fp32 factor of the noise, as little as averaging leaves of it.
        seed:    the run's seed.
        epochs:  (R,) int64, on the device of `images`, as the rest.
        indices: (R,) int64 sample indices.
    Returns:
        (R, H, W, 3) uint8.
    """
    pixels = images.shape[1] * images.shape[2]
    draws = _halves(seed, epochs, indices, 2 * pixels)
    counts = torch.arange(200, device=images.device, dtype=torch.float64)
    rates = rate.double()[:, None]
    below = (counts * rates.log() - rates - torch.lgamma(counts + 1)).exp().cumsum(dim=1)
    level = (draws[:, :pixels].double() + 0.5) / _LEVELS
    size = torch.searchsorted(below, level).float() * share[:, None]
    noise = torch.where(draws[:, pixels:] < _LEVELS // 2, size, -size).view(*images.shape[:3], 1)
    return (images + noise).round_().clamp_(0.0, 255.0).byte()


def _halves(seed: int, epochs: Tensor, indices: Tensor, count: int) -> Tensor:
    """(R, count) uniform in 0 .. 2^16 - 1."""
    words = uint32(seed, epochs, indices, -(-count // 2), Stream.NOISE)
    return torch.stack((words & (_LEVELS - 1), words >> 16), dim=2).flatten(1)[:, :count]


@functools.cache
def _normal_table() -> Tensor:
    """(65536,) fp32 quantiles of the normal distribution."""
    levels = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    return torch.special.ndtri(levels).float()
