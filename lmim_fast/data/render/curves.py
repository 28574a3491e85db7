"""The way that a line of text follows, from the coordinates of its box to the plane of its sign and back.

Box coordinates are in letter heights: u along the line, v down, (0, 0) its top left. In the plane x goes to
the right and y down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Curve(Protocol):
    """An invertible map of a box to the plane."""

    def to_plane(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where points of the box are in the plane."""
        ...

    def to_box(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which points of the box are at these places of the plane."""
        ...


@dataclass(frozen=True)
class Sag:
    """A parabola through the line's two ends: upright letters, moved up or down. 0 is a straight line."""

    width: float
    bend: float
    """How far the middle sags below the ends, in letter heights."""

    def to_plane(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Curve`."""
        return u, v + self._shift(u)

    def to_box(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Curve`."""
        return x, y - self._shift(x)

    def _shift(self, u: np.ndarray) -> np.ndarray:
        along = u * (2.0 / self.width) - 1.0
        return self.bend * (1.0 - along * along)


@dataclass(frozen=True)
class Arc:
    """A circle whose letters turn with it; their middles are as far apart as on a straight line."""

    width: float
    angle: float
    """Radians of the circle that the line covers; below 0 the line hangs (a smile) instead of arching."""

    @property
    def _side(self) -> float:
        return 1.0 if self.angle > 0 else -1.0

    @property
    def _radius(self) -> float:
        return self.width / abs(self.angle)

    def to_plane(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Curve`."""
        side, radius = self._side, self._radius
        turn = (u - self.width / 2) / radius
        reach = radius + side * (0.5 - v)
        return self.width / 2 + reach * np.sin(turn), 0.5 + side * (radius - reach * np.cos(turn))

    def to_box(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Curve`."""
        side, radius = self._side, self._radius
        across, along = x - self.width / 2, radius - side * (y - 0.5)
        return self.width / 2 + radius * np.arctan2(across, along), 0.5 - side * (
            np.hypot(across, along) - radius
        )
