"""The colour operations of a guidance view, composed in their sampled order (values 0..255)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lmim_fast.data.guidance import GuidanceParameters, Jitter, Operation
from lmim_fast.data.guidance_filter import filter_gains
from lmim_fast.ops.photometric import LUMA, ColorProgram

Array = NDArray[np.float64]

_GRAY = np.tile(np.array(LUMA), (3, 1))  # (3, 3): every colour becomes the gray value
_CONTRAST_CENTRE = 128.0
_NEVER = 256.0  # a threshold that no value reaches


class _Affine:
    """B affine colour maps that grow by one operation at a time: (B, 3, 3) and (B, 3)."""

    def __init__(self, batch: int) -> None:
        self.linear = np.tile(np.eye(3), (batch, 1, 1))
        self.offset = np.zeros((batch, 3))

    def then(self, rows: NDArray[np.bool_], linear: Array, offset: Array | float = 0.0) -> None:
        """Follow the maps of `rows` (B,) by linear (B, 3, 3) and offset (B, 1)."""
        moved = (linear * self.offset[:, None, :]).sum(axis=2) + offset
        product = (linear[:, :, :, None] * self.linear[:, None, :, :]).sum(axis=2)
        self.linear = np.where(rows[:, None, None], product, self.linear)
        self.offset = np.where(rows[:, None], moved, self.offset)

    def move_to(self, other: _Affine, rows: NDArray[np.bool_]) -> None:
        """Hand the maps of `rows` to `other` and start these anew."""
        other.linear = np.where(rows[:, None, None], self.linear, other.linear)
        other.offset = np.where(rows[:, None], self.offset, other.offset)
        self.linear = np.where(rows[:, None, None], np.eye(3), self.linear)
        self.offset = np.where(rows[:, None], 0.0, self.offset)

    def apply(self, color: Array) -> Array:
        """The maps' values at one colour (B, 3) each, clamped."""
        return np.clip((self.linear * color[:, None, :]).sum(axis=2) + self.offset, 0.0, 255.0)

    def tensor(self) -> torch.Tensor:
        """(B, 3, 4) fp32."""
        return torch.from_numpy(np.concatenate((self.linear, self.offset[:, :, None]), axis=2)).float()


def color_program(parameters: GuidanceParameters, coverage: NDArray[np.uint8]) -> ColorProgram:
    """Compose what is drawn for B samples into their colour programs.

    The filter runs first, whatever its place; the gain of a sharpening (its kernel does not sum to 1) is taken out
    before the colour operations that precede it and put back at its place, where it then scales their offsets too.

    Args:
        parameters: of B samples.
        coverage:   (B, H, W) share of each view pixel that shows the crop, 0..255.
    """
    batch = len(parameters)
    before, current = _Affine(batch), _Affine(batch)
    border = np.zeros((batch, 3))  # what rotation leaves black, as later operations change it
    gains = filter_gains(parameters)
    everyone = np.ones(batch, bool)
    current.then(everyone, _scale(1.0 / gains))
    solarize = np.zeros(batch, bool)
    for place in range(parameters.order.shape[1]):
        operation = parameters.order[:, place]
        step = _Affine(batch)
        contrast = parameters.contrast
        step.then(
            operation == Operation.CONTRAST, _scale(contrast), (_CONTRAST_CENTRE * (1.0 - contrast))[:, None]
        )
        step.then(operation == Operation.GRAYSCALE, _towards_gray(parameters.grayscale_alpha))
        step.then(operation == Operation.SHARPEN, _scale(gains))
        border = np.where((operation == Operation.ROTATE)[:, None], 0.0, step.apply(border))
        current.then(everyone, step.linear, step.offset)
        here = operation == Operation.SOLARIZE
        solarize |= here
        current.move_to(before, here)
        inverted = (border >= parameters.solarize_threshold[:, None]) == parameters.solarize_above[:, None]
        border = np.where(here[:, None] & inverted, 255.0 - border, border)
    current.move_to(before, ~solarize)
    contrast_factor, final = _jitter(parameters, current)
    return ColorProgram(
        before=before.tensor(),
        threshold=_float(np.where(solarize, parameters.solarize_threshold, _NEVER)),
        invert_above=torch.from_numpy(parameters.solarize_above | ~solarize),
        after=current.tensor(),
        coverage=torch.from_numpy(coverage),
        border=_float(_border_after_jitter(parameters, border)),
        contrast=_float(contrast_factor),
        final=final.tensor(),
    )


def _jitter(parameters: GuidanceParameters, current: _Affine) -> tuple[Array, _Affine]:
    """Add the colour jitter up to its contrast to `current`; the contrast factor, and the map that follows it."""
    final = _Affine(len(parameters))
    contrast_done = np.zeros(len(parameters), bool)
    for place in range(len(Jitter)):
        part = np.where(parameters.jitter, parameters.jitter_order[:, place], -1)
        for kind, linear in _jitter_maps(parameters):
            current.then((part == kind) & ~contrast_done, linear)
            final.then((part == kind) & contrast_done, linear)
        contrast_done |= part == Jitter.CONTRAST
    final.then(parameters.gray, np.tile(_GRAY, (len(parameters), 1, 1)))
    return np.where(parameters.jitter, parameters.jitter_factors[:, Jitter.CONTRAST], 1.0), final


def _border_after_jitter(parameters: GuidanceParameters, border: Array) -> Array:
    """The border colour (B, 3) after the jitter's parts that precede its contrast."""
    maps = _Affine(len(parameters))
    _jitter(parameters, maps)
    return maps.apply(border)


def _jitter_maps(parameters: GuidanceParameters) -> list[tuple[Jitter, Array]]:
    """The linear parts of the jitter, (B, 3, 3) each."""
    factors = parameters.jitter_factors
    return [
        (Jitter.BRIGHTNESS, _scale(factors[:, Jitter.BRIGHTNESS])),
        (Jitter.SATURATION, _towards_gray(1.0 - factors[:, Jitter.SATURATION])),
        (Jitter.HUE, _hue_rotation(factors[:, Jitter.HUE])),
    ]


def _scale(factor: Array) -> Array:
    return factor[:, None, None] * np.eye(3)


def _towards_gray(alpha: Array) -> Array:
    """Blend with the gray image: alpha 1 is gray, below 0 adds colour."""
    return (1.0 - alpha)[:, None, None] * np.eye(3) + alpha[:, None, None] * _GRAY


def _hue_rotation(turns: Array) -> Array:
    """Rotation of the colours about the gray axis, the linear neighbour of a hue shift in HSV."""
    cosine, sine = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    cross = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / np.sqrt(3.0)
    return (
        cosine[:, None, None] * np.eye(3)
        + sine[:, None, None] * cross
        + ((1.0 - cosine) / 3.0)[:, None, None] * np.ones((3, 3))
    )


def _float(values: Array) -> torch.Tensor:
    return torch.from_numpy(values).float()
