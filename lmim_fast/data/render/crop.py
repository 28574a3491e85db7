"""One rendered crop: a label painted on a surface, photographed and encoded. A function of (seed, index)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lmim_fast.data.render.coverage import Coverage
from lmim_fast.data.render.fonts import Face
from lmim_fast.data.render.labels import Vocabulary
from lmim_fast.data.render.layouts import Layout, LayoutShares
from lmim_fast.data.render.placement import Placement, random_placement
from lmim_fast.data.render.style import contrasting_colour, random_colour, stretched, surface
from lmim_fast.data.render.text import DRAWN_SIZE, scaled_ink
from lmim_fast.data.render.wordlist import WordList

RENDERER = 2
"""Version of the crops: raised when the same options and libraries give others."""

_LOW64 = 2**64 - 1
_PLATES = 0.18  # share of the crops, beside those whose layout has one
_NOISE_VALUES = 2**20  # four times the values of the largest crop: 4 MB a process


@dataclass(frozen=True)
class Recipe:
    """What all crops of a render have in common; picklable, for its processes."""

    vocabulary: Vocabulary
    layouts: LayoutShares
    seed: int

    def crop(self, index: int) -> tuple[str, bytes]:
        """The label and the encoded JPEG or PNG image of crop `index`, the same in any process and order."""
        rng = np.random.Generator(
            np.random.Philox(key=np.array([self.seed & _LOW64, index], dtype=np.uint64))
        )
        label, face = self.vocabulary.draw(rng)
        return label, render_label(rng, label, face, self.layouts.draw(rng, label))

    def save_words(self, folder: Path) -> Recipe:
        """A copy for the processes of a render, which share the words in this folder: see `with_words`.

        What the vocabulary has tried and remembers is no part of it.
        """
        self.vocabulary.words.save(folder)
        coverage = self.vocabulary.coverage
        return self._with(words=None, coverage=Coverage(coverage.faces, coverage.bits))

    def with_words(self, folder: Path) -> Recipe:
        """The copy with the words that were saved there."""
        return self._with(words=WordList.mapped(folder))

    def _with(self, **parts: Any) -> Recipe:
        return dataclasses.replace(self, vocabulary=dataclasses.replace(self.vocabulary, **parts))


def render_label(rng: np.random.Generator, label: str, face: Face, layout: Layout) -> bytes:
    """A label painted on a surface in this layout, photographed and encoded."""
    text = layout.text(rng, label, face)
    first = text.draw(DRAWN_SIZE)
    placement, font_size = random_placement(rng, layout, first)
    thickness = max(1, round(rng.uniform(0.03, 0.08) * font_size))
    margin = thickness + 2
    ink = scaled_ink(text, first, font_size, margin)
    image = _paint(rng, placement, ink, margin, thickness, layout.plate)
    return _encode(rng, _photograph(rng, image, placement.detail))


def _paint(
    rng: np.random.Generator,
    placement: Placement,
    ink: np.ndarray,
    margin: int,
    thickness: int,
    plate: bool,
) -> np.ndarray:
    """Text with its outline or shadow over a surface: (height, width, 3) float32 RGB."""
    height, width = placement.height, placement.width
    framed = 0.75 if plate else 0.5
    box = placement.box_map()
    image = surface(rng, height, width, random_colour(rng))
    plate = plate or rng.random() < _PLATES
    if plate:
        image = _plate(rng, image, placement, box, framed)
    fill = placement.resample(ink, margin, box)

    def behind(letters: np.ndarray) -> np.ndarray:
        """What the letters stand on: of a plate, not what is around it."""
        inside = image[letters > 128] if plate else image
        return inside if len(inside) else image

    effect = rng.random()
    if effect < 0.14:  # outline
        outline = _outline(placement, ink, margin, thickness, box)
        image = _over(image, outline, contrasting_colour(rng, behind(outline), 40.0))
        plate = True  # the fill stands on the outline
        return _over(image, fill, _fill_colour(rng, placement, behind(fill)))
    if effect < 0.17:  # outline alone, the fill shows the surface
        ring = cv2.subtract(_outline(placement, ink, margin, thickness, box), fill)
        return _over(image, ring, contrasting_colour(rng, behind(ring), 90.0))
    if effect < 0.34:  # shadow, soft or as a block
        image = _over(image, _shadow(rng, fill, placement.scale), _shadow_colour(rng, image))
    return _over(image, fill, _fill_colour(rng, placement, behind(fill)))


def _over(image: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """`colour`, (3,) or (height, width, 3), laid over the image with opacity `alpha` uint8."""
    over: np.ndarray = colour - image
    over *= alpha[..., None] * np.float32(1 / 255)
    over += image
    return over


def _fill_colour(rng: np.random.Generator, placement: Placement, behind: np.ndarray) -> np.ndarray:
    """One readable colour for the letters, now and then with a gradient or wear in it."""
    colour = contrasting_colour(rng, behind)
    if rng.random() < 0.25:
        field = stretched(rng, 2, 4, placement.height, placement.width)
        return colour + np.clip(field, -1.5, 1.5) * np.float32(rng.uniform(4.0, 16.0))
    return colour


def _outline(
    placement: Placement, ink: np.ndarray, margin: int, thickness: int, box: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    side = 2 * thickness + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    return placement.resample(cv2.dilate(ink, disc), margin, box)


def _shadow(rng: np.random.Generator, fill: np.ndarray, scale: float) -> np.ndarray:
    """The letters moved by a few pixels: blurred (a cast shadow) or drawn out (a block letter's side)."""
    shift = rng.choice((-1.0, 1.0), 2) * rng.uniform(0.03, 0.09, 2) * scale
    steps = 3 if rng.random() < 0.4 else 1
    shadow = np.zeros_like(fill)
    for step in range(steps):
        dx, dy = shift * (step + 1) / steps
        moved = cv2.warpAffine(fill, np.array([[1, 0, dx], [0, 1, dy]]), fill.shape[::-1])
        shadow = np.maximum(shadow, moved)
    if steps == 1:
        shadow = cv2.GaussianBlur(shadow, (0, 0), max(0.4, 0.03 * scale))
    return shadow


def _shadow_colour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Mostly the surface, darker; so that letters stay the strongest contrast."""
    mean = image.mean(axis=(0, 1))
    return mean * np.float32(rng.uniform(0.35, 0.75) if rng.random() < 0.8 else rng.uniform(1.2, 1.5))


def _plate(
    rng: np.random.Generator,
    image: np.ndarray,
    placement: Placement,
    box: tuple[np.ndarray, np.ndarray],
    framed: float,
) -> np.ndarray:
    """A sign behind the text, under the same perspective; what is around it shows at the crop's borders."""
    u, v = box
    left, right, top, bottom = rng.uniform(0.06, 0.3, 4)
    across, down = placement.geometry.width, placement.geometry.height
    inside = np.minimum(np.minimum(u + left, across + right - u), np.minimum(v + top, down + bottom - v))
    around = surface(rng, placement.height, placement.width, random_colour(rng))
    alpha = np.clip(inside * placement.scale + 0.5, 0.0, 1.0)[..., None]
    plate = around + alpha * (image - around)
    if rng.random() < framed:  # a frame
        distance = np.abs(inside - rng.uniform(0.02, 0.06)) * placement.scale
        frame = np.clip(1.5 - distance, 0.0, 1.0) * 255.0
        plate = _over(plate, frame.astype(np.uint8), random_colour(rng))
    return plate


def _photograph(rng: np.random.Generator, image: np.ndarray, detail: float) -> np.ndarray:
    """Light, lens and sensor: (height, width, 3) uint8. `detail`: pixels of one line's height."""
    height, width = image.shape[:2]
    if rng.random() < 0.5:
        light = np.clip(stretched(rng, 2, 3, height, width), -1.5, 1.5)
        image = image * (1.0 + light * np.float32(rng.uniform(0.03, 0.14)))
    if rng.random() < 0.07:
        image = image + _glare(rng, height, width)
    image = (image - 128.0) * np.float32(rng.uniform(0.6, 1.1)) + np.float32(128.0 + rng.normal(0.0, 12.0))
    image = _blur(rng, np.clip(image, 0.0, 255.0), detail)
    if rng.random() < 0.7:
        image = image + _sensor_noise(rng, image)
    return np.clip(image + 0.5, 0.0, 255.0).astype(np.uint8)


def _glare(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A soft reflection of a lamp."""
    x = (np.arange(width, dtype=np.float32) - np.float32(rng.uniform(0, width))) / height
    y = (np.arange(height, dtype=np.float32)[:, None] - np.float32(rng.uniform(0, height))) / height
    spot = np.exp(-(x * x + y * y) / np.float32(2 * rng.uniform(0.1, 0.4) ** 2))
    return spot[..., None] * np.float32(rng.uniform(20.0, 60.0))


def _blur(rng: np.random.Generator, image: np.ndarray, detail: float) -> np.ndarray:
    """Out of focus, moved, taken from afar, or none; bounded by `detail` so that words stay readable."""
    height, width = image.shape[:2]
    kind = rng.random()
    if kind < 0.40:
        return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.3 + 0.022 * detail))
    if kind < 0.48:
        length = max(3, round(rng.uniform(0.04, 0.1) * detail))
        kernel = np.zeros((length, length), dtype=np.float32)
        slope = rng.uniform(-1.0, 1.0)
        reach = (length - 1) / 2
        across = rng.random() < 0.5
        for step in range(length):
            other = round(reach + slope * (step - reach))
            kernel[(step, other) if across else (other, step)] = 1.0 / length
        return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)
    if kind < 0.65 and detail >= 32:
        factor = rng.uniform(1.2, min(2.5, detail / 18))
        small = cv2.resize(
            image, (max(2, round(width / factor)), round(height / factor)), interpolation=cv2.INTER_AREA
        )
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return image


def _sensor_noise(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Noise of light and colour, stronger in the dark; in half of the crops smoothed as cameras do."""
    height, width = image.shape[:2]
    colour = _noise(rng, height * width * 3).reshape(height, width, 3)
    noise = colour * np.float32(rng.uniform(0.2, 0.8)) + _noise(rng, height * width).reshape(height, width, 1)
    if rng.random() < 0.5:
        noise = cv2.GaussianBlur(noise, (0, 0), 0.7) * 1.6
    return noise * np.float32(rng.uniform(1.0, 8.0)) * (1.3 - image * np.float32(0.6 / 255))


def _noise(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` values of N(0, 1), a stretch of a fixed table: drawing them took an eighth of a crop's time."""
    start = int(rng.integers(_NOISE_VALUES - count + 1))
    return _noise_table()[start : start + count]


@lru_cache(maxsize=1)
def _noise_table() -> np.ndarray:
    return np.random.Generator(np.random.Philox(0)).standard_normal(_NOISE_VALUES, dtype=np.float32)


def _encode(rng: np.random.Generator, image: np.ndarray) -> bytes:
    """JPEG of quality 30 to 95, or PNG; one in thirty is gray."""
    gray = rng.random() < 1 / 30
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY if gray else cv2.COLOR_RGB2BGR)
    if rng.random() < 0.15:
        _, data = cv2.imencode(".png", pixels)
    else:
        _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 96))])
    return data.tobytes()
