"""Colours and surfaces of rendered crops: what the text is painted with and what it stands on."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np

LUMA = np.array((0.299, 0.587, 0.114), dtype=np.float32)  # of RGB, ITU-R BT.601
MIN_CONTRAST = 75.0  # luma between text and every part of what is behind it
# Paint, plastic and print of real signs: RGB.
_SIGN_COLOURS = (
    (245, 245, 242), (20, 20, 22), (190, 25, 35), (15, 70, 150), (0, 105, 65), (250, 205, 20), (235, 110, 20),
    (95, 60, 40), (120, 120, 125), (60, 20, 75), (0, 130, 150), (230, 220, 195), (110, 20, 30), (20, 35, 70),
    (170, 200, 60), (240, 170, 180), (150, 195, 230), (200, 170, 110),
)  # fmt: skip


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """An RGB colour, (3,) float32 in 0..255: a sign colour, any muted hue, or a grey."""
    kind = rng.random()
    if kind < 0.5:
        base = np.array(_SIGN_COLOURS[int(rng.integers(len(_SIGN_COLOURS)))], dtype=np.float32)
        colour = base + rng.normal(0.0, 12.0, 3)
    elif kind < 0.85:
        hue, saturation, value = rng.random(), rng.beta(1.6, 2.4), rng.uniform(0.08, 1.0)
        colour = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255.0
    else:
        colour = np.full(3, rng.uniform(0.0, 255.0)) + rng.normal(0.0, 4.0, 3)
    return np.clip(colour, 0.0, 255.0).astype(np.float32)


def contrasting_colour(
    rng: np.random.Generator, behind: np.ndarray, contrast: float = MIN_CONTRAST
) -> np.ndarray:
    """A colour whose luma is at least `contrast` from (nearly) all of the pixels `behind`, (..., 3) float32.

    Where no colour can be, the one of black and white that is further away.
    """
    low, high = np.percentile(behind.reshape(-1, 3) @ LUMA, (2, 98))
    for _ in range(12):
        colour = random_colour(rng)
        luma = float(colour @ LUMA)
        if luma <= low - contrast or luma >= high + contrast:
            return colour
    return np.full(3, 250.0 if 255.0 - high > low else 8.0, dtype=np.float32)


def surface(rng: np.random.Generator, height: int, width: int, colour: np.ndarray) -> np.ndarray:
    """What text stands on, textured around `colour`: (height, width, 3) float32."""
    image = np.empty((height, width, 3), dtype=np.float32)
    image[:] = colour
    makers = (None, _gradient, _gradient, _soft_noise, _soft_noise, _stripes, _bricks, _grain, _blobs)
    for _ in range(1 if rng.random() < 0.75 else 2):
        maker = makers[int(rng.integers(len(makers)))]
        if maker is not None:
            image += maker(rng, height, width)
    return image


def stretched(rng: np.random.Generator, rows: int, columns: int, height: int, width: int) -> np.ndarray:
    """Smooth field through N(0, 1) values at (rows, columns) points, as (height, width, 1) float32."""
    small = rng.standard_normal((rows, columns), dtype=np.float32)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]


def _tint(rng: np.random.Generator, strength: float) -> np.ndarray:
    """A change of colour with a luma of up to `strength`, lighter or darker."""
    tint = rng.uniform(0.4, 1.0, 3).astype(np.float32)
    return tint * np.float32(rng.choice((-1.0, 1.0)) * rng.uniform(0.3, 1.0) * strength / float(tint @ LUMA))


def _along(rng: np.random.Generator, height: int, width: int, direction: float) -> np.ndarray:
    """Distance in pixels along a direction, (height, width) float32."""
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    return x * np.float32(np.cos(direction)) + y * np.float32(np.sin(direction))


def _gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    ramp = _along(rng, height, width, rng.uniform(0.0, 2 * np.pi))
    ramp = (ramp - ramp.min()) / max(float(np.ptp(ramp)), 1.0) - 0.5
    return ramp[..., None] * _tint(rng, 50.0)


def _soft_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Clouds: three octaves of a smooth field."""
    field = np.zeros((height, width, 1), dtype=np.float32)
    cell = height / rng.uniform(1.0, 4.0)
    for octave in range(3):
        size = max(cell / 2**octave, 1.0)
        rows, columns = int(np.ceil(height / size)) + 1, int(np.ceil(width / size)) + 1
        field += stretched(rng, rows, columns, height, width) * 0.5**octave
    return np.clip(field, -2.0, 2.0) * _tint(rng, 17.0)


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Parallel bands at any angle: corrugated metal, blinds, wood (bands bent by noise)."""
    phase = _along(rng, height, width, rng.uniform(0.0, np.pi)) / np.float32(height * rng.uniform(0.08, 0.5))
    if rng.random() < 0.4:
        phase = phase + stretched(rng, 3, max(3, 3 * width // height), height, width)[..., 0] * 0.5
    wave = np.sin(2 * np.pi * phase)
    if rng.random() < 0.4:
        wave = np.tanh(4.0 * wave)
    return wave[..., None] * _tint(rng, 22.0)


def _bricks(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Courses of bricks or tiles with joints, each with its own shade."""
    course = height * rng.uniform(0.2, 0.7)
    length = course * rng.uniform(1.0, 3.0)
    y = (np.arange(height) + rng.uniform(0.0, course))[:, None] / course
    row = np.floor(y)
    offset = 0.5 * (row % 2) if rng.random() < 0.7 else 0.0
    x = (np.arange(width) + rng.uniform(0.0, length)) / length + offset
    shades = rng.normal(0.0, 9.0, (int(row.max()) + 1, int(x.max()) + 1)).astype(np.float32)
    image = shades[row.astype(int), np.floor(x).astype(int)][..., None].repeat(3, axis=2)
    joint = max(1.0, 0.04 * height)
    image[((y % 1.0) * course < joint) | ((x % 1.0) * length < joint)] = _tint(rng, 30.0)
    return image


def _grain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Plaster, asphalt, paper: noise of one pixel and of a few."""
    coarse = stretched(rng, height // 3 + 2, width // 3 + 2, height, width)
    fine = rng.standard_normal((height, width, 1), dtype=np.float32)
    return np.clip(coarse + 0.5 * fine, -2.5, 2.5) * _tint(rng, 14.0)


def _blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Soft shapes of other colours: leaves, people, other signs out of focus."""
    image = np.zeros((height, width, 3), dtype=np.float32)
    for _ in range(int(rng.integers(2, 7))):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        axes = tuple(int(axis) for axis in rng.uniform(0.1, 0.7, 2) * height + 2)
        colour = tuple(float(value) for value in _tint(rng, 42.0))
        cv2.ellipse(image, centre, axes, float(rng.uniform(0.0, 180.0)), 0.0, 360.0, colour, -1)
    return cv2.GaussianBlur(image, (0, 0), max(0.7, height * rng.uniform(0.02, 0.12)))
