"""The kinds of layout and what geometry each has: a table, from which one uniform number chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from lmim_fast.config import RenderConfig
from lmim_fast.data.render.curves import Arc, Curve, Sag
from lmim_fast.data.render.fonts import Face, needs_shaping
from lmim_fast.data.render.scripts import is_wide
from lmim_fast.data.render.text import Column, Line, random_column, random_line

MIN_HEIGHT, MAX_HEIGHT = 24, 96  # pixels of a crop, across the line
MAX_WIDTH = 640  # pixels along the line; longer lines make lower crops
MIN_LETTER, MAX_LETTER = 16, 56  # pixels of a letter on an arc
MAX_ARC = 288  # pixels of a crop with an arc, either side
_SHORTEST_CURVED = 4  # characters
_LONGEST_COLUMN = 14  # letters; longer lines are turned
_TIGHTEST = 0.95  # radius of an arc in letter heights


@dataclass(frozen=True)
class Geometry:
    """From the box of a text, `width` x `height` letter heights, to the plane that the crop is cut from."""

    width: float
    height: float
    curve: Curve
    plane: np.ndarray
    """(3, 3) homography, applied behind the curve."""

    def outline(self) -> np.ndarray:
        """Points around the box in the plane, (2, points)."""
        along = np.linspace(0.0, 1.0, 17)
        u = np.concatenate((along, along, np.zeros(17), np.ones(17))) * self.width
        v = np.concatenate((np.zeros(17), np.ones(17), along, along)) * self.height
        x, y = self.curve.to_plane(u, v)
        points = self.plane @ np.stack((x, y, np.ones_like(x)))
        return points[:2] / points[2]


@dataclass(frozen=True)
class Layout:
    """How one kind of crop shows its text."""

    name: str
    text: Callable[[np.random.Generator, str, Face], Line | Column]
    geometry: Callable[[np.random.Generator, float, float], Geometry]
    """From the width and height of the text in letter heights."""
    scale: Callable[[np.random.Generator, float, float], float]
    """Pixels per letter height, from the width and height of the crop in letter heights."""
    loose: float = 0.2
    """Most space around the text, in letter heights."""
    plate: bool = False
    """Whether there is always a sign behind the text, mostly with a frame."""


@dataclass(frozen=True)
class LayoutShares:
    """How often each layout is drawn; the rest is straight."""

    curved: float = 0.0
    vertical: float = 0.0
    sign: float = 0.0

    @classmethod
    def of(cls, config: RenderConfig) -> LayoutShares:
        """The shares of a command."""
        return cls(config.curved_share, config.vertical_share, config.sign_share)

    def draw(self, rng: np.random.Generator, label: str) -> Layout:
        """A layout that suits the label."""
        kind = rng.random()
        if kind < self.curved:
            return CURVED if len(label) >= _SHORTEST_CURVED else STRAIGHT
        if kind < self.curved + self.vertical:
            return _vertical(rng, label)
        return SIGN if kind < self.curved + self.vertical + self.sign else STRAIGHT


def _vertical(rng: np.random.Generator, label: str) -> Layout:
    """Chinese stands in columns; other scripts in columns or, if long or joined, on a turned line."""
    if len(label) == 1:
        return STRAIGHT
    if needs_shaping(label) or (len(label) > _LONGEST_COLUMN and not is_wide(label[0])):
        return TURNED
    return COLUMN if any(map(is_wide, label)) or rng.random() < 0.5 else TURNED


# --- geometry ---


def _straight(rng: np.random.Generator, width: float, height: float) -> Geometry:
    """Slant, perspective, rotation, and now and then a bend."""
    bend = 0.0
    if rng.random() < 0.18:
        bend = rng.choice((-1.0, 1.0)) * rng.uniform(0.08, 0.5) * min(1.0, width / 4)
    slant = rng.uniform(-0.25, 0.25) if rng.random() < 0.25 else 0.0
    shear = np.array([[1, -slant, 0], [0, 1, 0], [0, 0, 1]])
    perspective = _corners(rng, width, height) if rng.random() < 0.55 else np.eye(3)
    rotation = _small_rotation(rng, width / height, 0.9)
    return Geometry(width, height, Sag(width, float(bend)), rotation @ perspective @ shear)


def _turned(rng: np.random.Generator, width: float, height: float) -> Geometry:
    """A straight line, turned to run down (as on the back of a book) or up."""
    line = _straight(rng, width, height)
    down = rng.random() < 0.5
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]] if down else [[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    return Geometry(width, height, line.curve, quarter @ line.plane)


def _column(rng: np.random.Generator, width: float, height: float) -> Geometry:
    """Letters below each other, seen nearly from the front."""
    perspective = _corners(rng, width, height) if rng.random() < 0.55 else np.eye(3)
    rotation = _small_rotation(rng, height / width, 0.6)
    return Geometry(width, height, Sag(width, 0.0), rotation @ perspective)


def _curved(rng: np.random.Generator, width: float, height: float) -> Geometry:
    """A line on an arc of 40 to 200 degrees, arching or hanging."""
    most = min(np.radians(200.0), width / _TIGHTEST)
    angle = rng.uniform(np.radians(40.0), most) if most > np.radians(40.0) else most
    arc = Arc(width, float(angle if rng.random() < 0.65 else -angle))
    plane: np.ndarray = np.eye(3)
    if rng.random() < 0.5:
        yaw, pitch = np.radians(rng.uniform(-25.0, 25.0, 2))
        plane = _camera(yaw, pitch, width, height)
    return Geometry(width, height, arc, _rotation(np.radians(np.clip(rng.normal(0.0, 7.0), -20, 20))) @ plane)


def _sign(rng: np.random.Generator, width: float, height: float) -> Geometry:
    """A flat sign seen from the side, from below or above, and rolled."""
    yaw = np.radians(rng.choice((-1.0, 1.0)) * rng.uniform(15.0, 52.0))
    pitch = np.radians(np.clip(rng.normal(0.0, 14.0), -30.0, 30.0))
    plane = _camera(yaw, pitch, width, height)
    return Geometry(width, height, Sag(width, 0.0), _small_rotation(rng, width / height, 1.6, 12.0) @ plane)


def _corners(rng: np.random.Generator, width: float, height: float) -> np.ndarray:
    """Perspective that moves the corners of the box a little."""
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
    short, aspect = min(width, height), max(width, height) / min(width, height)
    reach = short * np.array([0.06 * min(aspect, 4.0), 0.13])
    moved = corners + np.clip(rng.normal(0.0, 0.6, (4, 2)), -1.0, 1.0) * (
        reach if width >= height else reach[::-1]
    )
    return cv2.getPerspectiveTransform(corners, moved.astype(np.float32))


def _camera(yaw: float, pitch: float, width: float, height: float) -> np.ndarray:
    """A plane turned about its middle, seen by a camera at about twice its size."""
    distance = 2.2 * max(width, height, 2.0)
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]]) @ np.array(
        [[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]]
    )
    project = np.array([[distance, 0, 0], [0, distance, 0], [0, 0, 1.0]])
    seen = project @ np.column_stack((turn[:, :2], (0.0, 0.0, distance)))
    return seen @ np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])


def _small_rotation(
    rng: np.random.Generator, aspect: float, rise: float, steep_deviation: float = 9.0
) -> np.ndarray:
    """Level within a few degrees, at times steeper; a long line rises by `rise` letter heights at most."""
    steep = rng.random() < 0.15
    angle = np.clip(rng.normal(0.0, steep_deviation if steep else 2.5), -20.0, 20.0)
    limit = np.degrees(np.arctan(rise / aspect))
    return _rotation(np.radians(np.clip(angle, -limit, limit)))


def _rotation(radians: float) -> np.ndarray:
    cos, sin = np.cos(radians), np.sin(radians)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


# --- size ---


def _line_scale(rng: np.random.Generator, width: float, height: float) -> float:
    target = MIN_HEIGHT * (MAX_HEIGHT / MIN_HEIGHT) ** rng.random()
    return min(target / height, MAX_WIDTH / width)


def _column_scale(rng: np.random.Generator, width: float, height: float) -> float:
    return _line_scale(rng, height, width)


def _arc_scale(rng: np.random.Generator, width: float, height: float) -> float:
    letter = MIN_LETTER * (MAX_LETTER / MIN_LETTER) ** rng.random()
    return min(letter, MAX_ARC / max(width, height))


STRAIGHT = Layout("straight", random_line, _straight, _line_scale)
CURVED = Layout("curved", random_line, _curved, _arc_scale)
TURNED = Layout("turned", random_line, _turned, _column_scale)
COLUMN = Layout("column", random_column, _column, _column_scale)
SIGN = Layout("sign", random_line, _sign, _line_scale, loose=0.45, plate=True)
