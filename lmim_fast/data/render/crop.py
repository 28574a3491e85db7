"""One rendered crop: a label painted on a surface, photographed and encoded. A function of (seed, index)."""

from __future__ import annotations

import cv2
import numpy as np

from lmim_fast.data.render.style import contrasting_colour, random_colour, stretched, surface
from lmim_fast.data.render.text import Placement, random_line, random_placement
from lmim_fast.data.render.words import Vocabulary

_LOW64 = 2**64 - 1


def render_crop(vocabulary: Vocabulary, seed: int, index: int) -> tuple[str, bytes]:
    """The label and the encoded JPEG or PNG image of crop `index`, the same in any process and order."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed & _LOW64, index], dtype=np.uint64)))
    label, font = vocabulary.draw(rng)
    line = random_line(rng, label, font.path)
    placement, font_size = random_placement(rng, line)
    thickness = max(1, round(rng.uniform(0.03, 0.08) * font_size))
    margin = thickness + 2
    ink = line.ink(font_size, margin)
    image = _paint(rng, placement, ink, margin, thickness)
    return label, _encode(rng, _photograph(rng, image))


def _paint(
    rng: np.random.Generator, placement: Placement, ink: np.ndarray, margin: int, thickness: int
) -> np.ndarray:
    """Text with its outline or shadow over a surface: (height, width, 3) float32 RGB."""
    height, width = placement.height, placement.width
    box = placement.box_map()
    image = surface(rng, height, width, random_colour(rng))
    if rng.random() < 0.18:
        image = _plate(rng, image, placement, box)
    fill = placement.resample(ink, margin, box)

    effect = rng.random()
    if effect < 0.14:  # outline
        colour = contrasting_colour(rng, image, 40.0)
        image = _over(image, _outline(placement, ink, margin, thickness, box), colour)
        behind = image[fill > 128]
        return _over(image, fill, _fill_colour(rng, placement, behind if len(behind) else image))
    if effect < 0.17:  # outline alone, the fill shows the surface
        ring = cv2.subtract(_outline(placement, ink, margin, thickness, box), fill)
        return _over(image, ring, contrasting_colour(rng, image, 90.0))
    if effect < 0.34:  # shadow, soft or as a block
        image = _over(image, _shadow(rng, fill, placement.scale), _shadow_colour(rng, image))
    return _over(image, fill, _fill_colour(rng, placement, image))


def _over(image: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """`colour`, (3,) or (height, width, 3), laid over the image with opacity `alpha` uint8."""
    share = alpha[..., None] * np.float32(1 / 255)
    return image + share * (colour - image)


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
    rng: np.random.Generator, image: np.ndarray, placement: Placement, box: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """A sign behind the text, under the same perspective; what is around it shows at the crop's borders."""
    u, v = box
    left, right, top, bottom = rng.uniform(0.06, 0.3, 4)
    inside = np.minimum(
        np.minimum(u + left, placement.aspect + right - u), np.minimum(v + top, 1 + bottom - v)
    )
    around = surface(rng, placement.height, placement.width, random_colour(rng))
    alpha = np.clip(inside * placement.scale + 0.5, 0.0, 1.0)[..., None]
    plate = around + alpha * (image - around)
    if rng.random() < 0.5:  # a frame
        distance = np.abs(inside - rng.uniform(0.02, 0.06)) * placement.scale
        frame = np.clip(1.5 - distance, 0.0, 1.0) * 255.0
        plate = _over(plate, frame.astype(np.uint8), random_colour(rng))
    return plate


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light, lens and sensor: (height, width, 3) uint8."""
    height, width = image.shape[:2]
    if rng.random() < 0.5:
        light = np.clip(stretched(rng, 2, 3, height, width), -1.5, 1.5)
        image = image * (1.0 + light * np.float32(rng.uniform(0.03, 0.14)))
    if rng.random() < 0.07:
        image = image + _glare(rng, height, width)
    image = (image - 128.0) * np.float32(rng.uniform(0.6, 1.1)) + np.float32(128.0 + rng.normal(0.0, 12.0))
    image = _blur(rng, np.clip(image, 0.0, 255.0))
    if rng.random() < 0.7:
        image = image + _sensor_noise(rng, image)
    return np.clip(image + 0.5, 0.0, 255.0).astype(np.uint8)


def _glare(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A soft reflection of a lamp."""
    x = (np.arange(width, dtype=np.float32) - np.float32(rng.uniform(0, width))) / height
    y = (np.arange(height, dtype=np.float32)[:, None] - np.float32(rng.uniform(0, height))) / height
    spot = np.exp(-(x * x + y * y) / np.float32(2 * rng.uniform(0.1, 0.4) ** 2))
    return spot[..., None] * np.float32(rng.uniform(20.0, 60.0))


def _blur(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Out of focus, moved, taken from afar, or none; bounded by the height so that words stay readable."""
    height, width = image.shape[:2]
    kind = rng.random()
    if kind < 0.40:
        return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.3 + 0.022 * height))
    if kind < 0.48:
        length = max(3, round(rng.uniform(0.04, 0.1) * height))
        kernel = np.zeros((length, length), dtype=np.float32)
        slope = rng.uniform(-1.0, 1.0)
        reach = (length - 1) / 2
        across = rng.random() < 0.5
        for step in range(length):
            other = round(reach + slope * (step - reach))
            kernel[(step, other) if across else (other, step)] = 1.0 / length
        return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)
    if kind < 0.65 and height >= 32:
        factor = rng.uniform(1.2, min(2.5, height / 18))
        small = cv2.resize(
            image, (max(2, round(width / factor)), round(height / factor)), interpolation=cv2.INTER_AREA
        )
        return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return image


def _sensor_noise(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Noise of light and colour, stronger in the dark; in half of the crops smoothed as cameras do."""
    height, width = image.shape[:2]
    noise = rng.standard_normal((height, width, 3), dtype=np.float32) * np.float32(rng.uniform(0.2, 0.8))
    noise += rng.standard_normal((height, width, 1), dtype=np.float32)
    if rng.random() < 0.5:
        noise = cv2.GaussianBlur(noise, (0, 0), 0.7) * 1.6
    return noise * np.float32(rng.uniform(1.0, 8.0)) * (1.3 - image * np.float32(0.6 / 255))


def _encode(rng: np.random.Generator, image: np.ndarray) -> bytes:
    """JPEG of quality 30 to 95, or PNG; one in thirty is gray."""
    gray = rng.random() < 1 / 30
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY if gray else cv2.COLOR_RGB2BGR)
    if rng.random() < 0.15:
        _, data = cv2.imencode(".png", pixels)
    else:
        _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 96))])
    return data.tobytes()
