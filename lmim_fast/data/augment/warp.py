"""Projective maps from views to crops: at what size a crop is sampled, where, and what of it is seen.

Coordinates are continuous, (x, y) with pixel (0, 0) covering the unit square.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Array32 = NDArray[np.float32]

_STEP = (
    2.0  # view pixels are at most so many pixels of the shrunk crop apart: bilinear sampling hardly aliases
)


def view_to_canvas(canvas: Array, image_size: tuple[int, int]) -> Array:
    """(B, 3, 3) from pixels of views to canvases of widths and heights (B, 2)."""
    height, width = image_size
    matrix = np.zeros((len(canvas), 3, 3))
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 2, 2] = canvas[:, 0] / width, canvas[:, 1] / height, 1.0
    return matrix


def working_sizes(matrix: Array, sizes: Array, image_size: tuple[int, int]) -> Array:
    """The heights and widths, (B, 2), to which crops are shrunk before filter and warp.

    Args:
        matrix:     (B, 3, 3) from pixels of views to the crops.
        sizes:      (B, 2) height and width of the crops.
        image_size: height and width of the views.
    """
    steps = _steps(matrix, image_size).max(axis=2)[:, ::-1]  # crop pixels per view pixel, along y and x
    limit = np.rint(_STEP * sizes / np.maximum(steps, 1e-6))
    return np.maximum(np.minimum(sizes, limit), 1.0)


def inverse_maps(
    matrix: Array, sizes: Array, working: Array, image_size: tuple[int, int]
) -> tuple[Array32, Array32]:
    """Where views look in the shrunk crops; outside they see the nearest pixel of the edge.

    Args:
        matrix:     (B, 3, 3) from pixels of views to the crops.
        sizes:      (B, 2) height and width of the crops.
        working:    (B, 2) height and width of the shrunk crops.
        image_size: height and width of the views.
    Returns:
        columns and rows, (B, H, W) each, pixel centres at whole numbers, never outside.
    """
    x, y = _project(matrix, image_size)
    maps = []
    for side, coordinate in ((1, x), (0, y)):
        shrink = (working[:, side] / sizes[:, side]).astype(np.float32)[:, None, None]
        limit = (working[:, side] - 1.0).astype(np.float32)[:, None, None]
        np.multiply(coordinate, shrink, out=coordinate)
        np.subtract(coordinate, np.float32(0.5), out=coordinate)
        maps.append(np.clip(coordinate, np.float32(0.0), limit, out=coordinate))
    return maps[0], maps[1]


def coverage(matrix: Array, canvas: Array, image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """(B, H, W) share of each view pixel that shows the canvas, 0..255.

    Args:
        matrix:     (B, 3, 3) from pixels of views to the canvases.
        canvas:     (B, 2) their widths and heights.
        image_size: height and width of the views.
    """
    softness = np.maximum(_steps(matrix, image_size).sum(axis=2), 1.0).astype(np.float32)
    share = np.ones((len(matrix), *image_size), np.float32)
    for axis, part in enumerate(_project(matrix, image_size)):
        middle = (canvas[:, axis] / 2).astype(np.float32)[:, None, None]
        inside = (middle - np.abs(part - middle)) / softness[:, axis, None, None] + np.float32(0.5)
        share *= np.clip(inside, 0.0, 1.0)
    return np.rint(share * 255.0).astype(np.uint8)


def _project(matrix: Array, image_size: tuple[int, int]) -> tuple[Array32, Array32]:
    """Centres of the view's pixels, mapped: x and y, (B, H, W) each."""
    height, width = image_size
    entries = matrix.astype(np.float32)[..., None, None]
    column = np.arange(width, dtype=np.float32)[None, None] + np.float32(0.5)
    row = np.arange(height, dtype=np.float32)[None, :, None] + np.float32(0.5)
    x, y = (
        entries[:, axis, 0] * column + (entries[:, axis, 1] * row + entries[:, axis, 2]) for axis in (0, 1)
    )
    bent = np.flatnonzero(matrix[:, 2, :2].any(axis=1))
    if len(bent):
        depth = entries[bent, 2, 0] * column + (entries[bent, 2, 1] * row + entries[bent, 2, 2])
        x[bent] /= depth
        y[bent] /= depth
    return x, y


def _steps(matrix: Array, image_size: tuple[int, int]) -> Array:
    """(B, 2, 2) distance along x and y between neighbours in a row and in a column, in the view's middle."""
    height, width = image_size
    points = [
        np.array([width / 2 + right, height / 2 + down, 1.0]) for right, down in ((0, 0), (1, 0), (0, 1))
    ]
    mapped = [(matrix * point).sum(axis=2) for point in points]
    flat = [point[:, :2] / point[:, 2:] for point in mapped]
    return np.abs(np.stack((flat[1] - flat[0], flat[2] - flat[0]), axis=2))
