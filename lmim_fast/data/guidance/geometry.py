"""The geometry of a guidance view as one inverse map: where in the crop each output pixel looks.

Coordinates are continuous, (x, y) with pixel (0, 0) covering the unit square. Crops, rotation and
perspective are projective, so a chain of them is one 3x3 matrix; the piecewise affine warp stands between the
chain that precedes it and the one that follows. Maps are evaluated on a coarse mesh and interpolated.

Borders as in the literal view: piecewise affine repeats edge pixels, outside the rotated crop it is black.
What is black is a coverage beside the map, so that later colour operations treat it as in the literal view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.guidance.parameters import GuidanceParameters, Operation

Array = NDArray[np.float64]
Array32 = NDArray[np.float32]
Points = tuple[Array32, Array32]
"""x and y, (B, N) each; elementwise fp32 arithmetic alone touches them, so a sample never feels its batch."""

_OVERSAMPLING = 2.0  # crops beyond this multiple of the view are shrunk to it before filter and warp
_CELL = (2, 4)  # view pixels per mesh cell; rows finer, the piecewise warp bends most over few rows


@dataclass(frozen=True)
class InverseMaps:
    """Where B views look."""

    x: NDArray[np.float32]
    """(B, H, W) column in the shrunk crop, pixel centres at whole numbers, never outside."""
    y: NDArray[np.float32]
    """(B, H, W) row."""
    coverage: NDArray[np.uint8]
    """(B, H, W) 255 where the crop is seen, 0 where rotation shows nothing."""


@dataclass
class _Chain:
    """The composed operations of B samples, from the view back to the crop."""

    to_piecewise: Array
    """(B, 3, 3) view [0, 1]^2 -> canvas on which the piecewise affine warp acts."""
    to_crop: Array
    """(B, 3, 3) from there -> crop."""
    piecewise_size: Array
    """(B, 2) width and height of that canvas."""
    to_rotated: Array
    """(B, 3, 3) -> canvas that was rotated; from the view, or the piecewise canvas if `rotated_first`."""
    rotated_size: Array
    """(B, 2) width and height of that canvas."""
    rotated_first: NDArray[np.bool_]
    """(B,) the rotation precedes the piecewise affine warp."""
    final_size: Array
    """(B, 2) width and height of the canvas that is resized to the view."""


def working_sizes(sizes: Array, image_size: tuple[int, int]) -> Array:
    """(B, 2) heights and widths at which crops of `sizes` (B, 2) are filtered and warped: bounds aliasing."""
    return np.minimum(sizes, np.rint(np.array(image_size) * _OVERSAMPLING))


def inverse_maps(
    parameters: GuidanceParameters, sizes: Array, working: Array, image_size: tuple[int, int]
) -> InverseMaps:
    """The maps of B samples.

    Args:
        parameters: what is drawn.
        sizes:      (B, 2) height and width of the crops.
        working:    (B, 2) height and width of the shrunk crops that are sampled.
        image_size: height and width of the view.
    """
    chain = _compose(parameters, sizes[:, ::-1])
    view = _mesh(len(parameters), image_size)
    bent = _piecewise(parameters, _project(chain.to_piecewise, view), chain.piecewise_size)
    source = _project(chain.to_crop, bent)
    shrink = (working / sizes).astype(np.float32)
    maps = []
    for axis, coordinate in enumerate(source):
        side = 1 - axis  # working sizes are height, width
        limit = (working[:, side] - 1.0).astype(np.float32)[:, None, None]
        dense = _densify(coordinate * shrink[:, side, None] - np.float32(0.5), image_size)
        maps.append(np.clip(dense, np.float32(0.0), limit))
    return InverseMaps(maps[0], maps[1], _coverage(parameters, chain, view, bent, image_size))


def _compose(parameters: GuidanceParameters, size: Array) -> _Chain:
    """Compose the operations in their order; `size` (B, 2) is the width and height of the crops."""
    batch = len(parameters)
    identity = np.tile(np.eye(3), (batch, 1, 1))
    crop_from = identity.copy()  # current canvas -> crop or, after the piecewise warp, -> its canvas
    chain = _Chain(identity, identity, size, identity, size, np.zeros(batch, bool), size)
    rotated_from = (
        identity.copy()
    )  # current canvas -> rotated canvas, kept up like crop_from once there is a rotation
    piecewise_done = np.zeros(batch, bool)
    rotation_done = np.zeros(batch, bool)
    for place in range(parameters.order.shape[1]):
        operation = parameters.order[:, place]
        step, new_size = _step(parameters, operation, size)
        rotates, warps = operation == Operation.ROTATE, operation == Operation.PIECEWISE_AFFINE
        chain.rotated_size = _choose(rotates, size, chain.rotated_size)
        rotation_done |= rotates
        crop_from = _multiply(crop_from, step)
        rotated_from = _choose(rotation_done, _multiply(rotated_from, step), rotated_from)
        # The piecewise warp cuts the chain: what was composed leads from its canvas to the crop.
        chain.to_crop = _choose(warps, crop_from, chain.to_crop)
        chain.piecewise_size = _choose(warps, size, chain.piecewise_size)
        chain.to_rotated = _choose(warps & rotation_done, rotated_from, chain.to_rotated)
        chain.rotated_first = chain.rotated_first | (warps & rotation_done)
        crop_from = _choose(warps, identity, crop_from)
        piecewise_done |= warps
        size = new_size
    to_canvas = _scaling(size)  # view [0, 1]^2 -> last canvas
    chain.final_size = size
    chain.to_piecewise = _multiply(crop_from, to_canvas)
    chain.to_crop = _choose(piecewise_done, chain.to_crop, identity)
    chain.to_rotated = _choose(chain.rotated_first, chain.to_rotated, _multiply(rotated_from, to_canvas))
    return chain


def _step(parameters: GuidanceParameters, operation: NDArray[np.int64], size: Array) -> tuple[Array, Array]:
    """One place of the order: (B, 3, 3) canvas after it -> canvas before it, and the new sizes (B, 2)."""
    matrix = np.tile(np.eye(3), (len(operation), 1, 1))
    cuts = (
        (Operation.CROP_HORIZONTAL, 0, parameters.crop_horizontal),
        (Operation.CROP_VERTICAL, 1, parameters.crop_vertical),
    )
    for kind, axis, shares in cuts:
        rows = operation == kind
        length = size[:, axis]
        first, last = np.rint(shares[:, 0] * length), np.rint(shares[:, 1] * length)
        kept = np.maximum(length - first - last, 1.0)
        matrix[rows, axis, axis] = (kept / length)[rows]
        matrix[rows, axis, 2] = np.minimum(first, length - 1.0)[rows]
    rows = operation == Operation.PERSPECTIVE
    matrix[rows] = _perspective(parameters.perspective[rows], size[rows])
    rows = operation == Operation.ROTATE
    matrix[rows], turned = _rotation(parameters.angle[rows], size[rows])
    new_size = size.copy()
    new_size[rows] = turned
    return matrix, new_size


def _rotation(angle: Array, size: Array) -> tuple[Array, Array]:
    """Rotation about the centre on a canvas grown to fit: inverse matrices, and the new sizes."""
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    extent = np.stack((np.abs(cosine), np.abs(sine)), axis=1)
    reach = np.stack(((extent * (size - 1)).sum(1), (extent[:, ::-1] * (size - 1)).sum(1)), axis=1) + 1
    turned = np.ceil(np.round(reach, 6))  # the rounding keeps an angle of 0 from adding a pixel
    matrix = np.tile(np.eye(3), (len(angle), 1, 1))
    matrix[:, 0, 0], matrix[:, 0, 1] = cosine, sine
    matrix[:, 1, 0], matrix[:, 1, 1] = -sine, cosine
    matrix[:, :2, 2] = size / 2 - (matrix[:, :2, :2] * (turned / 2)[:, None, :]).sum(axis=2)
    return matrix, turned


def _perspective(inward: Array, size: Array) -> Array:
    """Homographies from the canvas (B, 2) to the quadrilateral of its corners moved inwards (B, 4, 2)."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    quad = corners + inward * (1.0 - 2.0 * corners)
    # Heckbert's unit square to quadrilateral.
    d1, d2 = quad[:, 1] - quad[:, 2], quad[:, 3] - quad[:, 2]
    total = quad[:, 0] - quad[:, 1] + quad[:, 2] - quad[:, 3]
    determinant = d1[:, 0] * d2[:, 1] - d2[:, 0] * d1[:, 1]
    g = (total[:, 0] * d2[:, 1] - d2[:, 0] * total[:, 1]) / determinant
    h = (d1[:, 0] * total[:, 1] - total[:, 0] * d1[:, 1]) / determinant
    matrix = np.zeros((len(inward), 3, 3))
    matrix[:, :2, 0] = quad[:, 1] - quad[:, 0] + g[:, None] * quad[:, 1]
    matrix[:, :2, 1] = quad[:, 3] - quad[:, 0] + h[:, None] * quad[:, 3]
    matrix[:, :2, 2] = quad[:, 0]
    matrix[:, 2, 0], matrix[:, 2, 1], matrix[:, 2, 2] = g, h, 1.0
    return _multiply(_multiply(_scaling(size), matrix), _scaling(1.0 / size))


def _piecewise(parameters: GuidanceParameters, points: Points, size: Array) -> Points:
    """Move points by the piecewise affine warps of the samples that have one, clamped to its canvas.

    The control points stand on a regular 4x4 grid over the canvas; each of its 9 cells is two triangles.
    """
    rows = (parameters.order == Operation.PIECEWISE_AFFINE).any(axis=1) & (size.min(axis=1) > 1)
    if not rows.any():
        return points
    sides = size[rows].astype(np.float32)
    x, y = (np.clip(part[rows] * (3.0 / sides[:, axis, None]), 0.0, 3.0) for axis, part in enumerate(points))
    column, line = (np.minimum(part, 2.0).astype(np.int64) for part in (x, y))
    x -= column
    y -= line
    lower = x + y >= 1.0  # the triangle at the cell's end: the same planes, seen from there
    corner = (np.arange(len(x))[:, None] * 4 + line + lower) * 4 + column + lower
    turn = np.where(lower, -1, 1)
    np.subtract(lower, x, out=x, where=lower)
    np.subtract(lower, y, out=y, where=lower)
    moved = (points[0].copy(), points[1].copy())
    for axis in (0, 1):
        side = sides[:, axis, None]
        shift = (parameters.piecewise[rows, ..., axis] * side[..., None]).astype(np.float32).ravel()
        start = shift[corner]
        step = (shift[corner + turn] - start) * x + (shift[corner + 4 * turn] - start) * y
        moved[axis][rows] = np.clip(points[axis][rows] + start + step, np.float32(0.5), side - 0.5)
    return moved


def _coverage(
    parameters: GuidanceParameters, chain: _Chain, view: Points, bent: Points, image_size: tuple[int, int]
) -> NDArray[np.uint8]:
    """(B, H, W) share of each view pixel inside the rotated canvas, 0..255."""
    height, width = image_size
    coverage = np.full((len(parameters), height, width), 255, np.uint8)
    rows = (parameters.order == Operation.ROTATE).any(axis=1)
    if not rows.any():
        return coverage
    start = [
        np.where(chain.rotated_first[rows, None], late[rows], early[rows])
        for early, late in zip(view, bent, strict=True)
    ]
    inside = _project(chain.to_rotated[rows], (start[0], start[1]))
    # The edge is as soft as resampling makes it: a pixel of the canvas, or of the view where that is coarser.
    pixel = chain.final_size[rows] / np.array([width, height])
    angle = np.deg2rad(parameters.angle[rows])[:, None]
    softness = np.maximum(np.abs(np.cos(angle)) * pixel + np.abs(np.sin(angle)) * pixel[:, ::-1], 1.0)
    reach = chain.rotated_size[rows] / 2
    shares = []
    for axis, part in enumerate(inside):
        middle, soft = (value[:, axis, None].astype(np.float32) for value in (reach, softness))
        share = _densify((part - middle) / soft, image_size)  # from the canvas' middle, in widths of the edge
        np.abs(share, out=share)
        np.subtract((middle / soft)[..., None] + np.float32(0.5), share, out=share)
        shares.append(np.clip(share, 0.0, 1.0, out=share))
    shares[0] *= shares[1]
    shares[0] *= 255.0
    coverage[rows] = shares[0] + np.float32(0.5)
    return coverage


def _mesh(batch: int, image_size: tuple[int, int]) -> Points:
    """Centres of the mesh cells over the view [0, 1]^2 and of one ring around it."""
    y, x = (
        (np.arange(-1, cells + 1, dtype=np.float32) + np.float32(0.5)) * np.float32(cell / side)
        for side, cell, cells in zip(image_size, _CELL, _cells(image_size), strict=True)
    )
    columns, rows = np.meshgrid(x, y)
    shape = (batch, columns.size)
    return np.broadcast_to(columns.ravel(), shape), np.broadcast_to(rows.ravel(), shape)


def _cells(image_size: tuple[int, int]) -> list[int]:
    """Rows and columns of mesh cells that cover the view; the last ones may stand out of it."""
    return [-(-side // cell) for side, cell in zip(image_size, _CELL, strict=True)]


def _densify(values: Array32, image_size: tuple[int, int]) -> Array32:
    """Interpolate (B, N) on the mesh to (B, H, W), not contiguous."""
    high, wide = _CELL
    rows, columns = (cells + 2 for cells in _cells(image_size))
    batch = len(values)
    # One tall image: neighbouring samples only touch in the rings, which are cut off.
    size = (columns * wide, batch * rows * high)
    tall: Any = cv2.resize(values.reshape(batch * rows, columns), size, interpolation=cv2.INTER_LINEAR)
    dense: Array32 = tall.reshape(batch, rows * high, columns * wide)
    return dense[:, high : high + image_size[0], wide : wide + image_size[1]]


def _project(matrix: Array, points: Points) -> Points:
    """Apply (B, 3, 3) to points."""
    x, y = points
    entries = matrix.astype(np.float32)[..., None]
    depth = entries[:, 2, 0] * x + entries[:, 2, 1] * y + entries[:, 2, 2]
    return (
        (entries[:, 0, 0] * x + entries[:, 0, 1] * y + entries[:, 0, 2]) / depth,
        (entries[:, 1, 0] * x + entries[:, 1, 1] * y + entries[:, 1, 2]) / depth,
    )


def _multiply(left: Array, right: Array) -> Array:
    return (left[:, :, :, None] * right[:, None, :, :]).sum(axis=2)


def _scaling(size: Array) -> Array:
    matrix = np.zeros((len(size), 3, 3))
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 2, 2] = size[:, 0], size[:, 1], 1.0
    return matrix


def _choose(rows: NDArray[np.bool_], new: Array, old: Array) -> Array:
    return np.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
