"""ABINet's geometry as matrices from views to crops; its canvases are those of the released code."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.augment.abinet import AbinetParameters, Geometry
from lmim_fast.data.augment.warp import view_to_canvas

Array = NDArray[np.float64]
Size = tuple[float, float]
"""Width and height."""

_HALF = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])  # from centres on whole numbers
_BACK = np.array([[1.0, 0.0, -0.5], [0.0, 1.0, -0.5], [0.0, 0.0, 1.0]])


def view_matrices(parameters: AbinetParameters, sizes: Array, image_size: tuple[int, int]) -> Array:
    """(B, 3, 3) from pixels of views to crops of heights and widths `sizes` (B, 2).

    The canvas after the geometry is resized to the view, without regard to its aspect ratio.
    """
    canvas = sizes[:, ::-1].copy()
    to_crop = np.tile(np.eye(3), (len(parameters), 1, 1))
    for row in np.flatnonzero(parameters.geometry >= 0).tolist():
        width, height = sizes[row, 1], sizes[row, 0]
        forward, size = canvas_of(parameters, row, (width, height))
        canvas[row] = size
        to_crop[row] = _HALF @ np.linalg.inv(forward) @ _BACK
    return (to_crop[:, :, :, None] * view_to_canvas(canvas, image_size)[:, None, :, :]).sum(axis=2)


def canvas_of(parameters: AbinetParameters, row: int, size: Size) -> tuple[Array, Size]:
    """The geometry of sample `row`: matrix from crop to canvas, pixel centres on whole numbers; its size.

    A side of less than one pixel, which the released code could not warp, becomes one pixel.

    Args:
        parameters: of the sample, which has a geometry.
        row:        which sample.
        size:       width and height of the crop.
    """
    kind = parameters.geometry[row]
    if kind == Geometry.ROTATION:
        forward, canvas = _rotation(parameters.angle[row], size)
    elif kind == Geometry.AFFINE:
        forward, canvas = _affine(parameters.angle[row], parameters.scale[row], parameters.shear[row], size)
    else:
        forward, canvas = _perspective(parameters.corners[row], size)
    return forward, (max(1.0, canvas[0]), max(1.0, canvas[1]))


def _rotation(degrees: float, size: Size) -> tuple[Array, Size]:
    """Rotation on a canvas that grows to fit."""
    width, height = size
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    linear = np.array([[cosine, sine], [-sine, cosine]])
    canvas = (
        float(int(height * abs(sine) + width * cosine)),
        float(int(height * cosine + width * abs(sine))),
    )
    return _about_middle(linear, size, canvas), canvas


def _affine(degrees: float, scale: float, shear: Array, size: Size) -> tuple[Array, Size]:
    """Rotation, shear and scale; the canvas is the bounding box of the smallest rectangle about the crop.

    The released code takes torchvision's inverse matrix for the forward one: kept, angles are symmetric.
    """
    turn, (along_x, along_y) = np.deg2rad(degrees), np.deg2rad(shear)
    a = np.cos(turn - along_y) / np.cos(along_y)
    b = -a * np.tan(along_x) - np.sin(turn)
    c = np.sin(turn - along_y) / np.cos(along_y)
    d = -c * np.tan(along_x) + np.cos(turn)
    linear = np.array([[d, -b], [-c, a]]) / scale
    middle = _about_middle(linear, size, size)
    width, height = size
    corners = np.array([[0, 0, 1], [width - 1, 0, 1], [width - 1, height - 1, 1], [0, height - 1, 1]])
    box = _box((corners @ middle[:2].T).astype(np.int32))
    canvas = (float(box[2] - box[0]), float(box[3] - box[1]))
    return _about_middle(linear, size, canvas), canvas


def _perspective(inward: Array, size: Size) -> tuple[Array, Size]:
    """Corners moved inwards; the canvas is the bounding box of the smallest rectangle about them."""
    width, height = size
    shift = (inward * [width, height]).astype(np.int32)
    start = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.float32)
    end = start + shift * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    if min(size) < 2:  # no quadrilateral to look through
        return np.eye(3), size
    matrix = cv2.getPerspectiveTransform(start, end.astype(np.float32))
    left, top, right, bottom = _box(end.astype(np.float32))
    left, top = max(left, 0), max(top, 0)
    move = np.array([[1.0, 0.0, -left], [0.0, 1.0, -top], [0.0, 0.0, 1.0]])
    return move @ matrix, (float(right - left), float(bottom - top))


def _about_middle(linear: Array, size: Size, canvas: Size) -> Array:
    """(3, 3) of a linear map (2, 2) that carries (width / 2, height / 2) of the crop to the canvas'."""
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = np.array(canvas) / 2 - linear @ (np.array(size) / 2)
    return matrix


def _box(points: NDArray[Any]) -> list[int]:
    """Left, top, right and bottom of the smallest rectangle, however turned, about (4, 2) points."""
    corners = cv2.boxPoints(cv2.minAreaRect(points)).astype(np.int32)
    return [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()]
