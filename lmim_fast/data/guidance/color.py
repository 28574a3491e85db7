"""The colour operations of a guidance view, composed in their sampled order (values 0..255)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lmim_fast.data.guidance.filter import filter_gains
from lmim_fast.data.guidance.parameters import GuidanceParameters, Jitter, Operation
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

    def then(self, rows: NDArray[np.bool_], linear: Array, offset: Array | None = None) -> None:
        """Follow the maps of `rows` (B,) by linear (B, 3, 3) and offset (B, 3)."""
        chosen = np.flatnonzero(rows)
        if not len(chosen):
            return
        step = linear[chosen]
        moved = (step * self.offset[chosen, None, :]).sum(axis=2)
        self.offset[chosen] = moved if offset is None else moved + offset[chosen]
        self.linear[chosen] = (step[:, :, :, None] * self.linear[chosen, None, :, :]).sum(axis=2)

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

    The filter runs first, whatever its place. The gain of a sharpening (its kernel does not sum to 1) is
    taken out before all colour operations and put back at its place; there it scales their offsets too.

    Args:
        parameters: of B samples.
        coverage:   (B, H, W) share of each view pixel that shows the crop, 0..255.
    """
    batch = len(parameters)
    everyone, solarize = np.ones(batch, bool), np.zeros(batch, bool)
    before, current = _Affine(batch), _Affine(batch)
    border = np.zeros((batch, 3))  # what rotation leaves black, as later operations change it
    gains = filter_gains(parameters)
    current.then(everyone, _scale(1.0 / gains))
    contrast = _scale(parameters.contrast)
    lift = np.tile((_CONTRAST_CENTRE * (1.0 - parameters.contrast))[:, None], (1, 3))
    grayscale, gain = _towards_gray(parameters.grayscale_alpha), _scale(gains)
    for place in range(parameters.order.shape[1]):
        operation = parameters.order[:, place]
        step = _Affine(batch)
        step.then(operation == Operation.CONTRAST, contrast, lift)
        step.then(operation == Operation.GRAYSCALE, grayscale)
        step.then(operation == Operation.SHARPEN, gain)
        border = np.where((operation == Operation.ROTATE)[:, None], 0.0, step.apply(border))
        current.then(everyone, step.linear, step.offset)
        here = operation == Operation.SOLARIZE
        solarize |= here
        current.move_to(before, here)
        inverted = (border >= parameters.solarize_threshold[:, None]) == parameters.solarize_above[:, None]
        border = np.where(here[:, None] & inverted, 255.0 - border, border)
    current.move_to(before, ~solarize)
    early, final = _jitter(parameters)
    current.then(everyone, early.linear, early.offset)
    contrast_factors = parameters.jitter_factors[:, Jitter.CONTRAST]
    return ColorProgram(
        before=before.tensor(),
        threshold=_float(np.where(solarize, parameters.solarize_threshold, _NEVER)),
        invert_above=torch.from_numpy(parameters.solarize_above | ~solarize),
        after=current.tensor(),
        coverage=torch.from_numpy(coverage),
        border=_float(early.apply(border)),
        contrast=_float(np.where(parameters.jitter, contrast_factors, 1.0)),
        final=final.tensor(),
    )


def _jitter(parameters: GuidanceParameters) -> tuple[_Affine, _Affine]:
    """The colour jitter before its contrast, and what follows it, the final grayscale included."""
    batch = len(parameters)
    early, final = _Affine(batch), _Affine(batch)
    contrast_done = np.zeros(batch, bool)
    maps = _jitter_maps(parameters)
    for place in range(len(Jitter)):
        part = np.where(parameters.jitter, parameters.jitter_order[:, place], -1)
        for kind, linear in maps:
            early.then((part == kind) & ~contrast_done, linear)
            final.then((part == kind) & contrast_done, linear)
        contrast_done |= part == Jitter.CONTRAST
    final.then(parameters.gray, np.tile(_GRAY, (batch, 1, 1)))
    return early, final


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
