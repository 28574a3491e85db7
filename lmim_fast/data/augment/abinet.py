"""What ABINet's augmentation draws for an image: a function of (seed, epoch, sample index)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from lmim_fast.config import AugmentConfig
from lmim_fast.data.guidance.parameters import Draws, Jitter
from lmim_fast.ops.philox import Stream, uniform


class Geometry(enum.IntEnum):
    """The three kinds of geometry, of which an image gets one at most."""

    ROTATION = 0
    AFFINE = 1
    PERSPECTIVE = 2


class Deterioration(enum.IntEnum):
    """The three parts of the deterioration; an image gets all or none."""

    NOISE = 0
    MOTION_BLUR = 1
    RESCALE = 2


@dataclass(frozen=True)
class AbinetParameters:
    """What was drawn for B samples, enough to replay each view operation by operation."""

    geometry: NDArray[np.int64]
    """(B,) a `Geometry`; -1: none."""
    angle: NDArray[np.float64]
    """(B,) degrees of rotation and affine map; a positive rotation turns the content anticlockwise."""
    scale: NDArray[np.float64]
    """(B,) of the affine map."""
    shear: NDArray[np.float64]
    """(B, 2) degrees along x and y of the affine map."""
    corners: NDArray[np.float64]
    """(B, 4, 2) inward shift (x, y) of the corners, clockwise from top-left, share of the side."""
    deterioration: NDArray[np.bool_]
    """(B,) whether noise, motion blur and rescaling are applied."""
    deterioration_order: NDArray[np.int64]
    """(B, 3) its parts in the order they are applied."""
    variance: NDArray[np.float64]
    """(B,) of the noise, values 0..255."""
    blur_length: NDArray[np.int64]
    """(B,) pixels of the crop; 1 is no blur."""
    blur_angle: NDArray[np.float64]
    """(B,) degrees."""
    halvings: NDArray[np.int64]
    """(B,) of the size 128 x 512; 0 is no rescaling."""
    jitter: NDArray[np.bool_]
    """(B,) whether the colour jitter is applied."""
    jitter_order: NDArray[np.int64]
    """(B, 4) parts of the jitter in the order they are applied."""
    jitter_factors: NDArray[np.float64]
    """(B, 4) brightness, contrast and saturation factors, hue shift in turns."""

    def __len__(self) -> int:
        return len(self.geometry)

    def take(self, rows: NDArray[np.int64]) -> AbinetParameters:
        """The parameters of some of the samples."""
        return AbinetParameters(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})


_DRAWS = 54  # uniform numbers per sample; `sample_abinet` uses them in a fixed order
_KINDS = np.array([0.33, 0.66])  # ABINet's bounds between its three kinds of geometry


def sample_abinet(
    config: AugmentConfig, seed: int, epochs: torch.Tensor, indices: torch.Tensor
) -> AbinetParameters:
    """Draw geometry, deterioration and colours.

    ABINet draws kinds, order and strengths of the deterioration once per run and keeps them; here each image
    has its own.

    Args:
        config:  ranges.
        seed:    the run's seed.
        epochs:  (B,) int64.
        indices: (B,) int64 sample indices.
    Returns:
        The parameters of B samples; a sample's own do not depend on the others.
    """
    draws = Draws(uniform(seed, epochs, indices, _DRAWS, Stream.AUGMENT).double().numpy())
    geometric = draws.take(1)[:, 0] < config.geometry_probability
    kind = np.searchsorted(_KINDS, draws.take(1)[:, 0], side="right")
    brightness, contrast, saturation, hue = config.jitter
    jitter_bounds = [(max(0.0, 1.0 - s), 1.0 + s) for s in (brightness, contrast, saturation)] + [(-hue, hue)]
    return AbinetParameters(
        geometry=np.where(geometric, kind, -1),
        angle=config.rotate_degrees * _symmetric(draws),
        scale=draws.between(config.scale),
        shear=np.stack([degrees * _symmetric(draws) for degrees in config.shear_degrees], axis=1),
        corners=(config.distortion / 2 * _asymmetric(draws, 8)).reshape(-1, 4, 2),
        deterioration=draws.take(1)[:, 0] < config.deterioration_probability,
        deterioration_order=np.argsort(draws.take(len(Deterioration)), axis=1, kind="stable"),
        variance=_whole(config.noise_variance * _asymmetric(draws, 1)[:, 0]).astype(np.float64),
        blur_length=_whole(config.motion_blur * _asymmetric(draws, 1)[:, 0]),
        blur_angle=draws.between((-90.0, 90.0)),
        halvings=np.rint(draws.between((0.0, float(config.rescale)))).astype(np.int64),
        jitter=draws.take(1)[:, 0] < config.jitter_probability,
        jitter_order=np.argsort(draws.take(len(Jitter)), axis=1, kind="stable"),
        jitter_factors=np.stack([draws.between(bounds) for bounds in jitter_bounds], axis=1),
    )


def _symmetric(draws: Draws) -> NDArray[np.float64]:
    """(B,) in (-1, 1): Beta(4, 4), which is the median of seven uniform numbers, about its middle."""
    return 2.0 * np.median(draws.take(7), axis=1) - 1.0


def _asymmetric(draws: Draws, count: int) -> NDArray[np.float64]:
    """(B, count) of Beta(1, 4), by its inverse distribution function."""
    return 1.0 - (1.0 - draws.take(count)) ** 0.25


def _whole(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """ABINet's strengths are whole numbers, 1 at least."""
    return np.maximum(values.astype(np.int64), 1)
