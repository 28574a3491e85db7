"""Where a text goes in its crop: the crop is cut around it, and its ink is seen through the geometry."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from lmim_fast.data.render.layouts import Geometry, Layout
from lmim_fast.data.render.text import DRAWN_SIZE

_OVERSAMPLING = 1.3  # ink pixels per crop pixel
_LINE_OF_PIXELS = 1.4  # letter heights in the height of a usual crop of one line


@dataclass(frozen=True)
class Placement:
    """The crop's size and the way from its pixels to the box of the text."""

    height: int
    width: int
    scale: float
    """Crop pixels per letter height."""
    geometry: Geometry
    from_crop: np.ndarray
    """(3, 3) homography from crop pixels to the plane of the curve."""

    @property
    def detail(self) -> float:
        """The height in pixels that one line of these letters has: the measure of blur and of dirt."""
        return min(float(self.height), _LINE_OF_PIXELS * self.scale)

    def box_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Box coordinates (u, v), each (height, width) float32, of every crop pixel's centre."""
        x = np.arange(self.width, dtype=np.float32) + 0.5
        y = np.arange(self.height, dtype=np.float32)[:, None] + 0.5
        (a, b, c), (d, e, f), (g, h, i) = self.from_crop.astype(np.float32)
        depth = g * x + h * y + i
        return self.geometry.curve.to_box((a * x + b * y + c) / depth, (d * x + e * y + f) / depth)

    def resample(self, ink: np.ndarray, margin: int, box: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """An ink image with `margin` pixels around the box, seen in the crop: (height, width) uint8."""
        u, v = box
        ink_width = ink.shape[1] - 2 * margin
        ink_height = ink.shape[0] - 2 * margin
        map_x = u * np.float32(ink_width / self.geometry.width) + np.float32(margin - 0.5)
        map_y = v * np.float32(ink_height / self.geometry.height) + np.float32(margin - 0.5)
        return cv2.remap(ink, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)


def random_placement(
    rng: np.random.Generator, layout: Layout, measured: np.ndarray
) -> tuple[Placement, float]:
    """Geometry, padding and size of the crop that shows a text, and the font size to draw it with.

    Args:
        measured: the text's ink at DRAWN_SIZE, (height, width).
    """
    rows, columns = measured.shape
    stretch = rng.uniform(0.8, 1.2) if rng.random() < 0.5 else 1.0
    letter = min(rows, columns) if layout.name == "column" else rows
    geometry = layout.geometry(rng, columns / letter * stretch, rows / letter)

    points = geometry.outline()
    low, high = points.min(axis=1), points.max(axis=1)
    padding = rng.uniform(0.02, 0.45 if rng.random() < 0.15 else layout.loose, 4)
    low -= padding[:2]
    high += padding[2:]
    box_width, box_height = high - low
    scale = layout.scale(rng, box_width, box_height)
    height, width = max(8, round(box_height * scale)), max(8, round(box_width * scale))
    to_crop = np.array([[scale, 0, -low[0] * scale], [0, scale, -low[1] * scale], [0, 0, 1]]) @ geometry.plane
    placement = Placement(height, width, scale, geometry, np.linalg.inv(to_crop))
    return placement, _OVERSAMPLING * DRAWN_SIZE * scale / letter
