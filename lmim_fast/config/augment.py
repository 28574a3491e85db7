"""How training crops of the recogniser are augmented."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lmim_fast.config.checks import require


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of fine-tuning crops, drawn per image.

    The fields from `geometry_probability` to `jitter` are ABINet's, those from `operations` on PARSeq's.

    Source: ABINet's CVGeometry, CVDeterioration and CVColorJitter; PARSeq's RandAugment.
    """

    kind: Literal["abinet", "parseq", "none"] = "abinet"
    """abinet: the released recipe's; parseq: random operations of PARSeq; none: the plain view."""
    geometry_probability: float = 0.5
    """Share of the images that are rotated, sheared and scaled, or seen in perspective (a third each)."""
    rotate_degrees: float = 45.0
    """Largest rotation, below 90; small ones are likelier (Beta(4, 4))."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the affine scale. The canvas follows it: only its rounding is seen after the resize."""
    shear_degrees: tuple[float, float] = (45.0, 15.0)
    """Largest shear along x and along y, below 90; small ones are likelier (Beta(4, 4))."""
    distortion: float = 0.5
    """Corners move inwards by at most this share of half a side, below 1; little is likelier (Beta(1, 4))."""
    deterioration_probability: float = 0.25
    """Share of the images that get noise, motion blur and rescaling, in random order."""
    noise_variance: float = 20.0
    """Largest variance of the Gaussian noise, values 0..255; little is likelier (Beta(1, 4))."""
    motion_blur: float = 6.0
    """Longest motion blur in pixels of the crop, at most 15; short ones are likelier (Beta(1, 4))."""
    rescale: int = 4
    """Most halvings of a crop of 128 x 512, at most 5; the number is round(U(0, rescale))."""
    jitter_probability: float = 0.25
    """Share of the images that get the colour jitter."""
    jitter: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.1)
    """Brightness, contrast, saturation and hue of the colour jitter."""
    operations: int = 3
    """Different random operations drawn for an image, of 16."""
    operation_probability: float = 0.5
    """Chance that an operation that was drawn is applied."""
    magnitude: float = 5.0
    """Strength of the random operations, 0..10."""

    def __post_init__(self) -> None:
        require(
            self.kind in ("abinet", "parseq", "none"),
            f"kind must be abinet, parseq or none, got {self.kind!r}",
        )
        for name in (
            "geometry_probability",
            "deterioration_probability",
            "jitter_probability",
            "operation_probability",
        ):
            self._require_range(name, 0.0, 1.0)
        self._require_range("rotate_degrees", 0.0, 89.0)
        self._require_range("distortion", 0.0, 0.99)
        self._require_range("noise_variance", 0.0, 255.0**2)
        self._require_range("motion_blur", 0.0, 15.0)
        self._require_range("rescale", 0, 5)
        self._require_range("operations", 0, 16)
        self._require_range("magnitude", 0.0, 10.0)
        require(
            all(0.0 <= degrees < 90.0 for degrees in self.shear_degrees),
            f"shear_degrees must be in [0, 90), got {self.shear_degrees}",
        )
        low, high = self.scale
        require(0.0 < low <= high and math.isfinite(high), f"scale must be 0 < low <= high, got {self.scale}")
        require(
            all(0.0 <= strength < math.inf for strength in self.jitter) and self.jitter[3] <= 0.5,
            f"jitter must be >= 0, its hue at most 0.5, got {self.jitter}",
        )

    def _require_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        require(low <= value <= high, f"{name} must be in [{low:g}, {high:g}], got {value}")
