"""Strength of the guidance view."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lmim_fast.config.checks import require

MAX_BLUR_SIGMA = 5.0
"""Largest `GuidanceConfig.blur_sigma`: its kernel is 27 pixels wide, about the height of a word crop."""


@dataclass(frozen=True)
class GuidanceConfig:
    """Strength of the guidance view: the paper's "medium". Ranges are (low, high) of a uniform draw.

    Source: LMIM's released augmentation; the resize, jitter and grayscale that follow the sampled operations
    are part of the view.
    """

    min_operations: int = 3
    """Least operations of the ten that a view gets."""
    max_operations: int = 10
    """Most operations of the ten that a view gets."""
    contrast: tuple[float, float] = (0.5, 1.0)
    """Factor around 128."""
    blur_sigma: tuple[float, float] = (0.5, 1.5)
    """Gaussian sigma in pixels of the crop's own size, above 0 and at most 5."""
    crop_vertical: tuple[float, float] = (0.0, 0.10)
    """Share of the height cut at the top and at the bottom, each drawn, below 0.5."""
    crop_horizontal: tuple[float, float] = (0.0, 0.02)
    """Share of the width cut at the left and at the right, each drawn, below 0.5."""
    sharpen_alpha: tuple[float, float] = (0.0, 0.5)
    """Blend of the sharpened image."""
    sharpen_lightness: tuple[float, float] = (0.0, 0.5)
    """Lightness of the sharpening kernel's centre."""
    rotate_degrees: tuple[float, float] = (-15.0, 15.0)
    """Angle; the canvas grows to fit."""
    piecewise_scale: tuple[float, float] = (0.03, 0.05)
    """Standard deviation of the 4 x 4 control points' jitter, share of the side."""
    perspective_scale: tuple[float, float] = (0.02, 0.06)
    """Standard deviation of the corners' jitter, share of the side."""
    solarize_threshold: tuple[float, float] = (32.0, 128.0)
    """Threshold of the inversion, 0..255."""
    grayscale_alpha: tuple[float, float] = (0.0, 1.0)
    """Blend of the gray image."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation and hue of the colour jitter after the resize."""
    jitter_probability: float = 0.8
    """Share of the views that get the colour jitter."""
    grayscale_probability: float = 0.2
    """Share of the views that become gray after the jitter."""

    def __post_init__(self) -> None:
        require(
            0 <= self.min_operations <= self.max_operations <= 10,
            f"operations need 0 <= min <= max <= 10, got {self.min_operations} and {self.max_operations}",
        )
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, tuple) and len(value) == 2:
                require(value[0] <= value[1], f"{item.name} must be (low, high), got {value}")
            if isinstance(value, tuple):
                require(all(map(math.isfinite, value)), f"{item.name} must be finite, got {value}")
        self._require_between(0.0, 1.0, "sharpen_alpha", "grayscale_alpha")
        self._require_between(0.0, 1.0, "jitter_probability", "grayscale_probability")
        self._require_between(0.0, 255.0, "solarize_threshold")
        self._require_between(
            0.0, math.inf, "contrast", "sharpen_lightness", "piecewise_scale", "perspective_scale", "jitter"
        )
        for name in ("crop_vertical", "crop_horizontal"):
            low, high = getattr(self, name)
            require(low >= 0.0 and high < 0.5, f"{name} must be in [0, 0.5), got {(low, high)}")
        low, high = self.blur_sigma
        require(
            low > 0.0 and high <= MAX_BLUR_SIGMA,
            f"blur_sigma must be in (0, {MAX_BLUR_SIGMA:g}], got {self.blur_sigma}",
        )
        require(self.jitter[3] <= 0.5, f"the hue of jitter must be at most 0.5 turns, got {self.jitter}")

    def _require_between(self, least: float, most: float, *names: str) -> None:
        """Refuse those of the named fields that leave [least, most]."""
        for name in names:
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            bounds = f"in [{least:g}, {most:g}]" if math.isfinite(most) else f">= {least:g}"
            require(all(least <= part <= most for part in values), f"{name} must be {bounds}, got {value}")
