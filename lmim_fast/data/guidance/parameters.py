"""What is drawn for a guidance view: every draw is a function of (seed, epoch, sample index)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from lmim_fast.config import GuidanceConfig
from lmim_fast.ops.philox import Stream, uniform


class Operation(enum.IntEnum):
    """The ten operations of which a view gets some, in random order, each at most once."""

    CONTRAST = 0
    BLUR = 1
    CROP_VERTICAL = 2
    CROP_HORIZONTAL = 3
    SHARPEN = 4
    ROTATE = 5
    PIECEWISE_AFFINE = 6
    PERSPECTIVE = 7
    SOLARIZE = 8
    GRAYSCALE = 9


class Jitter(enum.IntEnum):
    """The four parts of the colour jitter, in the order of `GuidanceConfig.jitter`."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


@dataclass(frozen=True)
class GuidanceParameters:
    """What was drawn for B samples, enough to replay each view operation by operation."""

    order: NDArray[np.int64]
    """(B, 10) operations in the order they are applied; -1 after the last one."""
    contrast: NDArray[np.float64]
    """(B,) factor around 128."""
    blur_sigma: NDArray[np.float64]
    """(B,) pixels."""
    crop_vertical: NDArray[np.float64]
    """(B, 2) share of the height cut at the top and at the bottom."""
    crop_horizontal: NDArray[np.float64]
    """(B, 2) share of the width cut at the left and at the right."""
    sharpen_alpha: NDArray[np.float64]
    """(B,)"""
    sharpen_lightness: NDArray[np.float64]
    """(B,)"""
    angle: NDArray[np.float64]
    """(B,) degrees, positive turns the content clockwise."""
    piecewise: NDArray[np.float64]
    """(B, 4, 4, 2) shift (x, y) of each control point's source, rows by columns, share of the side."""
    perspective: NDArray[np.float64]
    """(B, 4, 2) inward shift (x, y) of the corners, clockwise from top-left, share of the side."""
    solarize_threshold: NDArray[np.float64]
    """(B,) 0..255."""
    solarize_above: NDArray[np.bool_]
    """(B,) invert values >= threshold, else values below it."""
    grayscale_alpha: NDArray[np.float64]
    """(B,) share of the gray image."""
    jitter: NDArray[np.bool_]
    """(B,) whether the colour jitter is applied."""
    jitter_order: NDArray[np.int64]
    """(B, 4) parts of the jitter in the order they are applied."""
    jitter_factors: NDArray[np.float64]
    """(B, 4) brightness, contrast and saturation factors, hue shift in turns."""
    gray: NDArray[np.bool_]
    """(B,) whether the view becomes gray at the end."""

    def __len__(self) -> int:
        return len(self.order)

    def take(self, rows: NDArray[np.int64] | slice) -> GuidanceParameters:
        """The parameters of some of the samples."""
        return GuidanceParameters(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})


class Draws:
    """Hands out the columns of a (B, count) table of uniform numbers."""

    def __init__(self, table: NDArray[np.float64]) -> None:
        self._table, self._next = table, 0

    def take(self, count: int) -> NDArray[np.float64]:
        """The next `count` columns, (B, count), in [0, 1)."""
        self._next += count
        return self._table[:, self._next - count : self._next]

    def between(self, bounds: tuple[float, float], count: int = 1) -> NDArray[np.float64]:
        """Uniform in `bounds`: (B,) for one, else (B, count)."""
        values = bounds[0] + (bounds[1] - bounds[0]) * self.take(count)
        return values[:, 0] if count == 1 else values

    def normal(self, count: int) -> NDArray[np.float64]:
        """Standard normal (B, count), count even, by Box-Muller."""
        radius = np.sqrt(-2.0 * np.log(1.0 - self.take(count // 2)))
        phase = 2.0 * np.pi * self.take(count // 2)
        return np.concatenate((radius * np.cos(phase), radius * np.sin(phase)), axis=1)


_DRAWS = 76  # uniform numbers per sample; `sample_parameters` uses them in a fixed order


def sample_parameters(
    config: GuidanceConfig, seed: int, epochs: torch.Tensor, indices: torch.Tensor
) -> GuidanceParameters:
    """Draw the operations and their strengths.

    Args:
        config:  ranges.
        seed:    the run's seed.
        epochs:  (B,) int64.
        indices: (B,) int64 sample indices.
    Returns:
        The parameters of B samples; a sample's own do not depend on the others.
    """
    draws = Draws(uniform(seed, epochs, indices, _DRAWS, Stream.GUIDANCE).double().numpy())
    spread = config.max_operations - config.min_operations + 1
    count = config.min_operations + np.floor(draws.take(1) * spread).astype(np.int64)
    order = np.argsort(draws.take(len(Operation)), axis=1, kind="stable")
    order = np.where(np.arange(len(Operation)) < count, order, -1)
    brightness, contrast, saturation, hue = config.jitter
    jitter_bounds = [(max(0.0, 1.0 - s), 1.0 + s) for s in (brightness, contrast, saturation)] + [(-hue, hue)]
    return GuidanceParameters(
        order=order,
        contrast=draws.between(config.contrast),
        blur_sigma=draws.between(config.blur_sigma),
        crop_vertical=draws.between(config.crop_vertical, 2),
        crop_horizontal=draws.between(config.crop_horizontal, 2),
        sharpen_alpha=draws.between(config.sharpen_alpha),
        sharpen_lightness=draws.between(config.sharpen_lightness),
        angle=draws.between(config.rotate_degrees),
        piecewise=(draws.between(config.piecewise_scale)[:, None] * draws.normal(32)).reshape(-1, 4, 4, 2),
        # A corner never passes the middle of its side, however strong the scale.
        perspective=np.abs(draws.between(config.perspective_scale)[:, None] * draws.normal(8)).reshape(
            -1, 4, 2
        )
        % 0.5,
        solarize_threshold=draws.between(config.solarize_threshold),
        solarize_above=draws.take(1)[:, 0] < 0.5,
        grayscale_alpha=draws.between(config.grayscale_alpha),
        jitter=draws.take(1)[:, 0] < config.jitter_probability,
        jitter_order=np.argsort(draws.take(len(Jitter)), axis=1, kind="stable"),
        jitter_factors=np.stack([draws.between(bounds) for bounds in jitter_bounds], axis=1),
        gray=draws.take(1)[:, 0] < config.grayscale_probability,
    )
