"""What PARSeq's augmentation draws for an image: a function of (seed, epoch, sample index)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lmim_fast.config import AugmentConfig
from lmim_fast.data.guidance.parameters import Draws
from lmim_fast.ops.philox import Stream, uniform


class Operation(enum.IntEnum):
    """The sixteen operations of which an image gets some, in random order, each at most once."""

    AUTO_CONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHEAR_X = 10
    SHEAR_Y = 11
    TRANSLATE_X = 12
    TRANSLATE_Y = 13
    GAUSSIAN_BLUR = 14
    POISSON_NOISE = 15


GEOMETRY = (
    Operation.ROTATE,
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
)
"""The operations that move pixels; each shows gray outside of the image it is given."""

FILL = 128.0
"""That gray."""


@dataclass(frozen=True)
class ParseqParameters:
    """What was drawn for B samples, enough to replay each view operation by operation."""

    order: NDArray[np.int64]
    """(B, K) operations in the order they are applied; -1: one that is drawn but not applied."""
    sign: NDArray[np.float64]
    """(B, K) -1 or 1: which way an operation goes that has two."""
    magnitude: float
    """Strength of all operations, 0..10."""

    def __len__(self) -> int:
        return len(self.order)

    def level(self, most: float) -> float:
        """The strength of an operation that reaches `most` at magnitude 10."""
        return most * self.magnitude / 10.0

    def factor(self, sign: NDArray[np.float64]) -> NDArray[np.float64]:
        """Factors of colour, contrast and brightness."""
        return np.maximum(0.1, 1.0 + sign * self.level(0.9))

    @property
    def bits(self) -> int:
        """Bits that posterizing keeps."""
        return 4 - int(self.level(4.0))

    @property
    def threshold(self) -> int:
        """Solarizing inverts from this value on."""
        return 256 - min(256, int(self.level(256.0)))

    @property
    def addition(self) -> int:
        """What is added to values below 128."""
        return min(128, int(self.level(110.0)))


ROTATE_DEGREES, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = 30.0, 0.9, 0.2, 0.10, 0.30
"""PARSeq's hyperparameters of timm's operations, at magnitude 10: degrees, slopes, shares of the side."""
BLUR_RADIUS, NOISE_RATE = 4.0, 40.0
"""Gaussian sigma in pixels, and mean of the Poisson noise, at magnitude 10."""


def blur_sigma(parameters: ParseqParameters, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B,) Gaussian sigma in pixels of crops of `sizes` (B, 2): no more than 2 % of the longer side, or 1."""
    most = np.maximum(1.0, 0.02 * sizes.max(axis=1))
    return np.rint(np.minimum(parameters.level(BLUR_RADIUS), most))


def noise_rate(parameters: ParseqParameters, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B,) mean of the Poisson noise of crops of `sizes` (B, 2): odd, at most 20 % of the longer side."""
    most = np.maximum(1.0, 0.2 * sizes.max(axis=1))
    return (np.rint(np.minimum(parameters.level(NOISE_RATE), most)).astype(np.int64) | 1).astype(np.float64)


def sample_parseq(
    config: AugmentConfig, seed: int, epochs: torch.Tensor, indices: torch.Tensor
) -> ParseqParameters:
    """Draw the operations, whether they are applied, and their directions.

    Args:
        config:  number, probability and magnitude of the operations.
        seed:    the run's seed.
        epochs:  (B,) int64.
        indices: (B,) int64 sample indices.
    Returns:
        The parameters of B samples; a sample's own do not depend on the others.
    """
    count = len(Operation)
    draws = Draws(uniform(seed, epochs, indices, 3 * count, Stream.AUGMENT).double().numpy())
    order = np.argsort(draws.take(count), axis=1, kind="stable")
    applied = draws.take(count) < config.operation_probability
    sign = np.where(draws.take(count) < 0.5, -1.0, 1.0)
    kept = slice(config.operations)
    return ParseqParameters(np.where(applied, order, -1)[:, kept], sign[:, kept], config.magnitude)
