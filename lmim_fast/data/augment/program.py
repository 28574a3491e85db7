"""The program of augmented views: what the pipeline executes, whatever drew it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lmim_fast.config import AugmentConfig
from lmim_fast.data.augment.abinet import AbinetParameters, sample_abinet
from lmim_fast.data.augment.abinet_finish import AbinetFinish
from lmim_fast.data.augment.abinet_geometry import view_matrices
from lmim_fast.data.augment.deterioration import motion_kernels, noise_deviation, rescaled
from lmim_fast.data.augment.keys import Keys
from lmim_fast.data.augment.parseq import Operation, ParseqParameters, blur_sigma, sample_parseq
from lmim_fast.data.augment.parseq_finish import ParseqFinish
from lmim_fast.data.augment.parseq_geometry import compose
from lmim_fast.data.augment.warp import inverse_maps, working_sizes
from lmim_fast.data.guidance.kernels import Kernels

Array = NDArray[np.float64]
AugmentParameters = AbinetParameters | ParseqParameters

_IDENTITY = np.ones((1, 1), np.float32)


@dataclass(frozen=True)
class AugmentProgram:
    """What the pipeline executes for B samples."""

    working_size: NDArray[np.float32]
    """(B, 2) height and width to which crops are shrunk before filter and warp."""
    kernels: Kernels
    """For the shrunk crop."""
    map_x: NDArray[np.float32]
    """(B, H, W) source column of every output pixel, in pixels of the shrunk crop, inside it."""
    map_y: NDArray[np.float32]
    """(B, H, W) source row."""
    finish: Callable[[Tensor], Tensor]
    """Noise and colours after the warp: (B, H, W, 3) uint8 -> the same tensor, changed in place."""


def sample_augmentation(config: AugmentConfig, keys: Keys) -> AugmentParameters:
    """Draw the augmentation of B samples; `config.kind` is not "none"."""
    return sample_parseq(config, *keys) if config.kind == "parseq" else sample_abinet(config, *keys)


def make_augment_program(
    parameters: AugmentParameters,
    keys: Keys,
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    image_size: tuple[int, int] = (32, 128),
) -> AugmentProgram:
    """Turn drawn parameters into what the pipeline executes.

    Args:
        parameters: of B samples.
        keys:       theirs, for the noise.
        heights:    (B,) pixels of the crops as decoded.
        widths:     (B,)
        image_size: height and width of the view.
    """
    sizes = np.stack((np.asarray(heights), np.asarray(widths)), axis=1).astype(np.float64)
    if isinstance(parameters, ParseqParameters):
        return _parseq(parameters, keys, sizes, image_size)
    matrix = view_matrices(parameters, sizes, image_size)
    working = rescaled(parameters, working_sizes(matrix, sizes, image_size))
    finish = AbinetFinish(parameters, noise_deviation(parameters, sizes, image_size), keys, image_size)
    return _program(matrix, sizes, working, motion_kernels(parameters, sizes / working), finish, image_size)


def _parseq(
    parameters: ParseqParameters, keys: Keys, sizes: Array, image_size: tuple[int, int]
) -> AugmentProgram:
    canvases = compose(parameters, sizes, image_size)
    working = working_sizes(canvases.matrix, sizes, image_size)
    kernels = [_IDENTITY] * len(parameters)
    sigma = blur_sigma(parameters, sizes)[:, None] * working / sizes
    for row in np.flatnonzero((parameters.order == Operation.GAUSSIAN_BLUR).any(axis=1)).tolist():
        kernels[row] = gaussian_kernel(sigma[row])
    finish = ParseqFinish(parameters, canvases, sizes, keys, image_size)
    return _program(canvases.matrix, sizes, working, kernels, finish, image_size)


def gaussian_kernel(sigma: Array) -> NDArray[np.float32]:
    """Odd square kernel of a Gaussian; sigma (2,) in pixels along y and x, 0 is no blur."""
    radius = int(np.ceil(3.0 * sigma.max()))
    taps = np.arange(-radius, radius + 1)
    rows, columns = np.exp(-0.5 * (taps / np.maximum(sigma, 1e-3)[:, None]) ** 2)
    kernel = rows[:, None] * columns
    return np.asarray(kernel / kernel.sum(), np.float32)


def _program(
    matrix: Array,
    sizes: Array,
    working: Array,
    kernels: list[NDArray[np.float32]],
    finish: Callable[[Tensor], Tensor],
    image_size: tuple[int, int],
) -> AugmentProgram:
    map_x, map_y = inverse_maps(matrix, sizes, working, image_size)
    return AugmentProgram(working.astype(np.float32), Kernels.of(kernels), map_x, map_y, finish)
