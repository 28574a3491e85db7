"""ABINet's deterioration: motion blur as a kernel, rescaling as a size, and what is left of the noise."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.augment.abinet import AbinetParameters, Deterioration
from lmim_fast.data.guidance.filter import resample_matrices

Array = NDArray[np.float64]

_BASE = np.array([128.0, 512.0])  # the size that is halved
_IDENTITY = np.ones((1, 1), np.float32)


def rescaled(parameters: AbinetParameters, working: Array) -> Array:
    """Working sizes (B, 2) of crops, no larger than the rescaling leaves them; the warp enlarges again."""
    return np.where(_rescales(parameters)[:, None], np.minimum(working, _halved(parameters)), working)


def motion_kernel(length: int, degrees: float) -> Array:
    """(length, length) kernel of the released code, its anchor at length // 2; a long one may sum to < 1."""
    middle = length // 2
    line = np.zeros((length, length))
    line[middle] = 1.0
    turn = cv2.getRotationMatrix2D((middle, middle), degrees, 1)
    return np.asarray(cv2.warpAffine(line, turn, (length, length)), np.float64) / length


def motion_kernels(parameters: AbinetParameters, scale: Array) -> list[NDArray[np.float32]]:
    """The motion blurs of B samples as odd square kernels.

    Args:
        parameters: lengths in pixels of the crop's own size.
        scale:      (B, 2) own size over the size that is filtered, per axis, >= 1.
    """
    kernels: list[NDArray[np.float32]] = [_IDENTITY] * len(parameters)
    for row in np.flatnonzero(_blurs(parameters)).tolist():
        length = int(parameters.blur_length[row])
        radius = length // 2
        full = np.zeros((2 * radius + 1, 2 * radius + 1))
        full[:length, :length] = motion_kernel(length, parameters.blur_angle[row])
        rows, columns = (
            resample_matrices(scale[row : row + 1, axis], np.array([radius]), radius)[0] for axis in (0, 1)
        )
        kernels[row] = np.ascontiguousarray(rows @ full @ columns.T, np.float32)
    return kernels


def noise_deviation(parameters: AbinetParameters, sizes: Array, image_size: tuple[int, int]) -> Array:
    """(B,) standard deviation of the noise in the view; 0 without noise.

    Noise of the crop's own pixels is averaged where the blur follows it, and where the rescaling that follows
    it or the resize to the view shrinks it. What enlarges it leaves it as it is: in the view it stays white.
    """
    places = np.argsort(parameters.deterioration_order, axis=1, kind="stable")  # of each part in the order
    noise = places[:, Deterioration.NOISE]
    deviation = np.sqrt(parameters.variance)
    for row in np.flatnonzero(_blurs(parameters) & (places[:, Deterioration.MOTION_BLUR] > noise)).tolist():
        kernel = motion_kernel(int(parameters.blur_length[row]), parameters.blur_angle[row])
        deviation[row] *= np.sqrt((kernel**2).sum())
    least = np.minimum(sizes, np.array(image_size))
    shrinks = _rescales(parameters) & (places[:, Deterioration.RESCALE] > noise)
    least = np.where(shrinks[:, None], np.minimum(least, _halved(parameters)), least)
    deviation *= np.sqrt((least / sizes).prod(axis=1))
    return np.where(parameters.deterioration, deviation, 0.0)


def _blurs(parameters: AbinetParameters) -> NDArray[np.bool_]:
    return parameters.deterioration & (parameters.blur_length > 1)


def _rescales(parameters: AbinetParameters) -> NDArray[np.bool_]:
    return parameters.deterioration & (parameters.halvings > 0)


def _halved(parameters: AbinetParameters) -> Array:
    return _BASE / 2.0 ** parameters.halvings[:, None]
