"""Blur and sharpen of a guidance view as one small convolution kernel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.guidance import GuidanceParameters, Operation

Array = NDArray[np.float64]

_BLUR_RADIUS = 2  # imgaug's window for sigma up to 1.5
_SHARPEN_RADIUS = 1
_RADIUS = _BLUR_RADIUS + _SHARPEN_RADIUS
_SIDE = 2 * _RADIUS + 1
_IDENTITY = np.ones((1, 1), np.float32)


def filter_gains(parameters: GuidanceParameters) -> Array:
    """(B,) sum of each sample's kernel; below 1 where it sharpens, as in imgaug."""
    gain = 1.0 - parameters.sharpen_alpha * (1.0 - parameters.sharpen_lightness)
    return np.where((parameters.order == Operation.SHARPEN).any(axis=1), gain, 1.0)


def filter_kernels(parameters: GuidanceParameters, scale: Array) -> list[NDArray[np.float32]]:
    """The kernels of B samples.

    Args:
        parameters: strengths in pixels of the crop's own size.
        scale:      (B, 2) own size over the size that is filtered, per axis, >= 1.
    Returns:
        B square kernels, 1x1 (identity) to 7x7.
    """
    blurs = (parameters.order == Operation.BLUR).any(axis=1)
    sharpens = (parameters.order == Operation.SHARPEN).any(axis=1)
    full = _compose(parameters, blurs, sharpens)
    radii = np.where(blurs, _BLUR_RADIUS, 0) + np.where(sharpens, _SHARPEN_RADIUS, 0)
    rows, columns = (_resample(scale[:, axis], radii) for axis in (0, 1))
    full = (rows[:, :, :, None] * full[:, None, :, :]).sum(axis=2)  # (B, out rows, columns)
    full = (full[:, :, None, :] * columns[:, None, :, :]).sum(axis=3)
    full = full.astype(np.float32)
    kernels = []
    for kernel, radius in zip(full, radii.tolist(), strict=True):
        inside = slice(_RADIUS - radius, _RADIUS + radius + 1)
        kernels.append(np.ascontiguousarray(kernel[inside, inside]) if radius else _IDENTITY)
    return kernels


def _compose(parameters: GuidanceParameters, blurs: NDArray[np.bool_], sharpens: NDArray[np.bool_]) -> Array:
    """(B, 7, 7) blur convolved with sharpen at the crop's own size."""
    batch = len(parameters)
    taps = np.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    weights = np.exp(-0.5 * (taps / parameters.blur_sigma[:, None]) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    weights = np.where(blurs[:, None], weights, (taps == 0).astype(float))
    blur = weights[:, :, None] * weights[:, None, :]
    # imgaug's Sharpen: (1 - alpha) * identity + alpha * [[-1, -1, -1], [-1, 8 + lightness, -1], [-1, -1, -1]]
    alpha = np.where(sharpens, parameters.sharpen_alpha, 0.0)
    around = -alpha
    centre = 1.0 - alpha + alpha * (8.0 + parameters.sharpen_lightness)
    full = np.zeros((batch, _SIDE, _SIDE))
    for row in range(3):
        for column in range(3):
            weight = centre if row == column == 1 else around
            full[:, row : row + blur.shape[1], column : column + blur.shape[2]] += (
                weight[:, None, None] * blur
            )
    return full


def _resample(scale: Array, radii: NDArray[np.int64]) -> Array:
    """(B, 7, 7) matrices that carry the taps of kernels of `radii` to a grid `scale` times coarser.

    Each tap is split over three neighbours inside its kernel's window: sum, centre and spread are kept.
    """
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    positions = offsets / scale[:, None]  # (B, taps)
    inner = np.maximum(radii - 1, 0)[:, None]
    nearest = np.clip(np.rint(positions), -inner, inner)
    rest = positions - nearest
    matrix = np.zeros((len(scale), _SIDE, _SIDE))
    for shift, weight in ((-1, (rest**2 - rest) / 2), (0, 1 - rest**2), (1, (rest**2 + rest) / 2)):
        hit = (nearest + shift)[:, None, :] == offsets[None, :, None]  # (B, out, taps)
        matrix += hit * weight[:, None, :]
    return matrix
