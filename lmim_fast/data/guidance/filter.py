"""Blur and sharpen of a guidance view as one small convolution kernel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.guidance.parameters import GuidanceParameters, Operation

Array = NDArray[np.float64]

_WINDOW_SIGMA = 1.5  # up to here imgaug's window is the least, 5 x 5
_LEAST_RADIUS = 2
_SHARPEN_RADIUS = 1
_LEAST_GAIN = 1e-3  # a kernel may sum to 0 (alpha 1, lightness 0), but colours are divided by its gain
_IDENTITY = np.ones((1, 1), np.float32)


def filter_gains(parameters: GuidanceParameters) -> Array:
    """(B,) sum of each sample's kernel; below 1 where it sharpens, as in imgaug."""
    gain = 1.0 - parameters.sharpen_alpha * (1.0 - parameters.sharpen_lightness)
    gain = np.maximum(gain, _LEAST_GAIN)
    return np.where((parameters.order == Operation.SHARPEN).any(axis=1), gain, 1.0)


def filter_kernels(parameters: GuidanceParameters, scale: Array) -> list[NDArray[np.float32]]:
    """The kernels of B samples.

    Args:
        parameters: strengths in pixels of the crop's own size.
        scale:      (B, 2) own size over the size that is filtered, per axis, >= 1.
    Returns:
        B square kernels, 1x1 (identity) to 7x7 for sigmas up to 1.5.
    """
    radii = np.where((parameters.order == Operation.BLUR).any(axis=1), _radii(parameters.blur_sigma), 0)
    kernels: list[NDArray[np.float32]] = [_IDENTITY] * len(parameters)
    # Arrays of one size per radius, not of the batch's largest: a sample's sums never feel its batch.
    windows = np.maximum(radii, _LEAST_RADIUS)
    for window in np.unique(windows).tolist():
        rows = np.flatnonzero(windows == window)
        same_window = _kernels(parameters.take(rows), scale[rows], radii[rows], window)
        for row, kernel in zip(rows.tolist(), same_window, strict=True):
            kernels[row] = kernel
    return kernels


def _radii(sigma: Array) -> NDArray[np.int64]:
    """Radius of each blur: imgaug's up to 1.5, beyond it 3 pixels more for each pixel of sigma.

    imgaug's own window grows half as fast and cuts the Gaussian: its blur of sigma 4 has a deviation of 2.7.
    """
    return _LEAST_RADIUS + np.ceil(3.0 * np.maximum(sigma - _WINDOW_SIGMA, 0.0)).astype(np.int64)


def _kernels(
    parameters: GuidanceParameters, scale: Array, blur_radii: NDArray[np.int64], window: int
) -> list[NDArray[np.float32]]:
    """`filter_kernels` of samples whose blur has the radius `window`, or that have none (radius 0)."""
    sharpens = (parameters.order == Operation.SHARPEN).any(axis=1)
    full = _compose(parameters, blur_radii > 0, sharpens, window)
    radii = blur_radii + np.where(sharpens, _SHARPEN_RADIUS, 0)
    reach = window + _SHARPEN_RADIUS
    rows, columns = (resample_matrices(scale[:, axis], radii, reach) for axis in (0, 1))
    full = (rows[:, :, :, None] * full[:, None, :, :]).sum(axis=2)  # (B, out rows, columns)
    full = (full[:, :, None, :] * columns[:, None, :, :]).sum(axis=3)
    full = full.astype(np.float32)
    kernels = []
    for kernel, radius in zip(full, radii.tolist(), strict=True):
        inside = slice(reach - radius, reach + radius + 1)
        kernels.append(np.ascontiguousarray(kernel[inside, inside]) if radius else _IDENTITY)
    return kernels


def _compose(
    parameters: GuidanceParameters, blurs: NDArray[np.bool_], sharpens: NDArray[np.bool_], window: int
) -> Array:
    """(B, taps, taps) blur of radius `window` convolved with sharpen, at the crop's own size."""
    batch = len(parameters)
    taps = np.arange(-window, window + 1)
    weights = np.exp(-0.5 * (taps / parameters.blur_sigma[:, None]) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    weights = np.where(blurs[:, None], weights, (taps == 0).astype(float))
    blur = weights[:, :, None] * weights[:, None, :]
    # imgaug's Sharpen: (1 - alpha) * identity + alpha * [[-1, -1, -1], [-1, 8 + lightness, -1], [-1, -1, -1]]
    alpha = np.where(sharpens, parameters.sharpen_alpha, 0.0)
    around = -alpha
    centre = 1.0 - alpha + alpha * (8.0 + parameters.sharpen_lightness)
    side = len(taps) + 2 * _SHARPEN_RADIUS
    full = np.zeros((batch, side, side))
    for row in range(3):
        for column in range(3):
            weight = centre if row == column == 1 else around
            full[:, row : row + blur.shape[1], column : column + blur.shape[2]] += (
                weight[:, None, None] * blur
            )
    return full


def resample_matrices(scale: Array, radii: NDArray[np.int64], reach: int) -> Array:
    """(B, taps, taps) matrices that carry the taps of kernels of `radii` to a grid `scale` times coarser.

    Each tap is split over three neighbours inside its kernel's window: sum, centre and spread are kept.
    """
    offsets = np.arange(-reach, reach + 1)
    positions = offsets / scale[:, None]  # (B, taps)
    inner = np.maximum(radii - 1, 0)[:, None]
    nearest = np.clip(np.rint(positions), -inner, inner)
    rest = positions - nearest
    matrix = np.zeros((len(scale), len(offsets), len(offsets)))
    for shift, weight in ((-1, (rest**2 - rest) / 2), (0, 1 - rest**2), (1, (rest**2 + rest) / 2)):
        hit = (nearest + shift)[:, None, :] == offsets[None, :, None]  # (B, out, taps)
        matrix += hit * weight[:, None, :]
    return matrix
