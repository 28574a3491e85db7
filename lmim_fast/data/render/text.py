"""Sets one line of text: its ink, and where that ink goes in a crop (bend, slant, perspective, rotation)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lmim_fast.data.render.fonts import needs_shaping

MIN_HEIGHT, MAX_HEIGHT = 24, 96  # pixels of a crop
MAX_WIDTH = 640  # longer lines make lower crops
_MEASURE_SIZE = 64.0  # font size, pixels, at which a line is measured
_OVERSAMPLING = 1.3  # ink pixels per crop pixel
_SMALLEST_BOX = 0.5  # of the font size: a lone dot does not fill a crop


@dataclass(frozen=True)
class Line:
    """A label in a font with its letter spacing; sizes scale with the font size."""

    label: str
    font_path: str
    spacing: float
    """Extra space after each letter, share of the font size."""
    wobble: tuple[float, ...]
    """Vertical shift of each letter, share of the font size; empty for none."""

    def ink(self, size: float, margin: int) -> np.ndarray:
        """The line drawn with a font of `size` pixels: (height, width) uint8, `margin` empty pixels about."""
        shaped = needs_shaping(self.label)
        engine = ImageFont.Layout.RAQM if shaped else ImageFont.Layout.BASIC
        font = ImageFont.truetype(self.font_path, size, layout_engine=engine)
        room = int(2 * size) + 2
        width = int(font.getlength(self.label) + max(self.spacing, 0.0) * size * len(self.label)) + 2 * room
        canvas = Image.new("L", (width, 2 * room))
        draw = ImageDraw.Draw(canvas)
        if not self.wobble and (shaped or self.spacing == 0.0):
            draw.text((room, room), self.label, fill=255, font=font, anchor="ls")
        else:
            for place, letter in enumerate(self.label):
                x = room + font.getlength(self.label[:place]) + place * self.spacing * size
                y = room + (self.wobble[place] * size if self.wobble else 0.0)
                draw.text((x, y), letter, fill=255, font=font, anchor="ls")
        left, top, right, bottom = canvas.getbbox() or (room, room, room + 1, room + 1)
        missing = max(0, int(_SMALLEST_BOX * size) - (bottom - top))
        top, bottom = top - missing // 2, bottom + missing - missing // 2
        return np.asarray(canvas.crop((left - margin, top - margin, right + margin, bottom + margin)))


def random_line(rng: np.random.Generator, label: str, font_path: str) -> Line:
    """The label with random letter spacing; one line in twelve dances on its baseline."""
    spacing, wobble = 0.0, ()
    if not needs_shaping(label):
        kind = rng.random()
        if kind < 0.35:
            spacing = rng.uniform(0.02, 0.12)
        elif kind < 0.45:
            spacing = rng.uniform(0.12, 0.4) / max(1.0, len(label) / 8)
        elif kind < 0.52:
            spacing = rng.uniform(-0.03, 0.0)
        if len(label) > 1 and rng.random() < 0.08:
            wobble = tuple(rng.normal(0.0, 0.04, len(label)))
    return Line(label, font_path, float(spacing), wobble)


@dataclass(frozen=True)
class Placement:
    """Where the text box goes in a crop. Box coordinates: height 1, width `aspect`, origin top left."""

    height: int
    width: int
    scale: float
    """Crop pixels per box height."""
    aspect: float
    bend: float
    """How far the middle of the line sags below its ends, in box heights."""
    from_crop: np.ndarray
    """(3, 3) homography from crop pixels to the box, before the bend is undone."""

    def box_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Box coordinates (u, v), each (height, width) float32, of every crop pixel's centre."""
        x = np.arange(self.width, dtype=np.float32) + 0.5
        y = np.arange(self.height, dtype=np.float32)[:, None] + 0.5
        (a, b, c), (d, e, f), (g, h, i) = self.from_crop.astype(np.float32)
        depth = g * x + h * y + i
        u = (a * x + b * y + c) / depth
        v = (d * x + e * y + f) / depth
        return u, v - _sag(u, self.aspect, self.bend)

    def resample(self, ink: np.ndarray, margin: int, box: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """An ink image with `margin` pixels around the box, seen in the crop: (height, width) uint8."""
        u, v = box
        ink_width = ink.shape[1] - 2 * margin
        ink_height = ink.shape[0] - 2 * margin
        map_x = u * (ink_width / self.aspect) + (margin - 0.5)
        map_y = v * ink_height + (margin - 0.5)
        return cv2.remap(ink, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)


def random_placement(rng: np.random.Generator, line: Line) -> tuple[Placement, float]:
    """Geometry, padding and size of the crop that shows `line`, and the font size to draw it with."""
    measured = line.ink(_MEASURE_SIZE, 0)
    stretch = rng.uniform(0.8, 1.2) if rng.random() < 0.5 else 1.0
    aspect = measured.shape[1] / measured.shape[0] * stretch
    to_plane, bend = _random_geometry(rng, aspect)

    # The outline of the box in the plane, then a crop around it.
    u = np.tile(np.linspace(0.0, aspect, 17), 2)
    v = np.repeat((0.0, 1.0), 17) + _sag(u, aspect, bend)
    plane = to_plane @ np.stack((u, v, np.ones_like(u)))
    plane = plane[:2] / plane[2]
    low, high = plane.min(axis=1), plane.max(axis=1)
    loose = rng.random() < 0.15
    padding = rng.uniform(0.02, 0.45 if loose else 0.2, 4)
    low -= padding[:2]
    high += padding[2:]

    box_width, box_height = high - low
    target = MIN_HEIGHT * (MAX_HEIGHT / MIN_HEIGHT) ** rng.random()
    scale = min(target / box_height, MAX_WIDTH / box_width)
    height, width = max(8, round(box_height * scale)), max(8, round(box_width * scale))
    to_crop = np.array([[scale, 0, -low[0] * scale], [0, scale, -low[1] * scale], [0, 0, 1]]) @ to_plane
    placement = Placement(height, width, scale, aspect, bend, np.linalg.inv(to_crop))
    return placement, _OVERSAMPLING * _MEASURE_SIZE * scale / measured.shape[0]


def _sag(u: np.ndarray, aspect: float, bend: float) -> np.ndarray:
    """Vertical shift of a bent line at u, a parabola through its two ends."""
    along = u * (2.0 / aspect) - 1.0
    return bend * (1.0 - along * along)


def _random_geometry(rng: np.random.Generator, aspect: float) -> tuple[np.ndarray, float]:
    """Homography from the box to the plane (slant, perspective, rotation), and the bend."""
    bend = (
        rng.choice((-1.0, 1.0)) * rng.uniform(0.08, 0.5) * min(1.0, aspect / 4)
        if rng.random() < 0.18
        else 0.0
    )
    slant = rng.uniform(-0.25, 0.25) if rng.random() < 0.25 else 0.0
    shear = np.array([[1, -slant, 0], [0, 1, 0], [0, 0, 1]])

    perspective: np.ndarray = np.eye(3)
    if rng.random() < 0.55:
        corners = np.array([[0, 0], [aspect, 0], [aspect, 1], [0, 1]], dtype=np.float32)
        reach = np.array([0.06 * min(aspect, 4.0), 0.13])
        moved = corners + np.clip(rng.normal(0.0, 0.6, (4, 2)), -1.0, 1.0) * reach
        perspective = cv2.getPerspectiveTransform(corners, moved.astype(np.float32))

    steep = rng.random() < 0.15
    angle = np.clip(rng.normal(0.0, 9.0 if steep else 2.5), -20.0, 20.0)
    limit = np.degrees(np.arctan(0.9 / aspect))  # a long line may rise by 0.9 of its height
    radians = np.radians(np.clip(angle, -limit, limit))
    cos, sin = np.cos(radians), np.sin(radians)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return rotation @ perspective @ shear, float(bend)
