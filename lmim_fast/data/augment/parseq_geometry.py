"""PARSeq's geometry as one matrix from view to crop, and what each operation leaves gray."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.augment.parseq import (
    GEOMETRY,
    ROTATE_DEGREES,
    SHEAR_X,
    SHEAR_Y,
    TRANSLATE_X,
    TRANSLATE_Y,
    Operation,
    ParseqParameters,
)
from lmim_fast.data.augment.warp import coverage, view_to_canvas

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Canvases:
    """The composed geometry of B samples of K operations each."""

    matrix: Array
    """(B, 3, 3) from pixels of views to the crops."""
    coverages: list[NDArray[np.uint8]]
    """For each place, (R, H, W) share of the view that shows the image given to its operation, 0..255."""
    rows: list[NDArray[np.int64]]
    """For each place, (R,) the samples that have geometry there."""


def compose(parameters: ParseqParameters, sizes: Array, image_size: tuple[int, int]) -> Canvases:
    """Compose the geometry of crops of heights and widths `sizes` (B, 2), in its drawn order."""
    batch, places = parameters.order.shape
    size = sizes[:, ::-1].copy()
    given, steps, moved = [], [], []
    for place in range(places):
        rows = np.flatnonzero(np.isin(parameters.order[:, place], GEOMETRY))
        step = np.tile(np.eye(3), (batch, 1, 1))
        given.append(size.copy())
        for row in rows.tolist():
            step[row], size[row] = _step(parameters, row, place, size[row])
        steps.append(step)
        moved.append(rows)
    matrix = view_to_canvas(size, image_size)
    coverages: list[NDArray[np.uint8]] = []
    for place in reversed(range(places)):
        matrix = (steps[place][:, :, :, None] * matrix[:, None, :, :]).sum(axis=2)
        rows = moved[place]
        coverages.append(coverage(matrix[rows], given[place][rows], image_size))
    return Canvases(matrix, coverages[::-1], moved)


def _step(parameters: ParseqParameters, row: int, place: int, size: Array) -> tuple[Array, Array]:
    """Matrix (3, 3) from the canvas after one operation to that before it, and the new width and height."""
    operation, sign = parameters.order[row, place], parameters.sign[row, place]
    matrix = np.eye(3)
    if operation == Operation.ROTATE:
        return rotation(sign * parameters.level(ROTATE_DEGREES), size)
    if operation == Operation.SHEAR_X:
        matrix[0, 1] = sign * parameters.level(SHEAR_X)
    elif operation == Operation.SHEAR_Y:
        matrix[1, 0] = sign * parameters.level(SHEAR_Y)
    elif operation == Operation.TRANSLATE_X:
        matrix[0, 2] = sign * parameters.level(TRANSLATE_X) * size[0]
    else:
        matrix[1, 2] = sign * parameters.level(TRANSLATE_Y) * size[1]
    return matrix, size


def rotation(degrees: float, size: Array) -> tuple[Array, Array]:
    """Rotation about the middle, positive turns the content anticlockwise, on a canvas grown to fit.

    PARSeq lets the canvas grow so that no character is cut off; its size is PIL's.
    """
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    linear = np.array([[cosine, -sine], [sine, cosine]])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * size / 2 @ linear + size / 2
    canvas = np.ceil(corners.max(axis=0).round(9)) - np.floor(corners.min(axis=0).round(9))
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = size / 2 - linear @ (canvas / 2)
    return matrix, canvas
