"""Both views of a crop in the released manner: one image at a time, one operation after the other.

What `bench_data` compares the input pipeline with. A worker process of the released loader does this for
each sample: Pillow decodes the record and resizes the plain view; for the guidance view 3 to 10 of ten
operations run in random order, each on the bytes that the one before left; Pillow resizes the result,
jitters its colours and makes some views gray; both are normalised.

Each operation is as quick as NumPy and OpenCV make it: tables of bytes for contrast and solarize, one filter
for all channels, piecewise affine by the plain formula of its triangles and OpenCV's remap. So this stands
for the manner alone; `released_imgaug` runs the ten operations of the library that the release uses, which
takes several times as long. Numbers are drawn by Python's own generator. The package reads nothing of this,
and nothing here but the strengths is the package's.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from lmim_fast.config import GuidanceConfig

Bytes = NDArray[np.uint8]
View = NDArray[np.float32]


class ReleasedViews:
    """Callable: an encoded image to its plain and guidance view, (3, H, W) fp32 in [-1, 1] each.

    Args:
        config:     strengths, as of the pipeline's guidance view.
        seed:       of the draws.
        image_size: height and width of the views.
    """

    def __init__(
        self, config: GuidanceConfig, seed: int = 0, image_size: tuple[int, int] = (32, 128)
    ) -> None:
        self.config, self.random = config, random.Random(seed)
        self._size = (image_size[1], image_size[0])
        self.operations: tuple[Callable[[Bytes], Bytes], ...] = (
            self.contrast, self.blur, self.crop_vertical, self.crop_horizontal, self.sharpen,
            self.rotate, self.piecewise_affine, self.perspective, self.solarize, self.grayscale,
        )  # fmt: skip

    def __call__(self, encoded: bytes) -> tuple[View, View]:
        picture = Image.open(io.BytesIO(encoded)).convert("RGB")
        plain = picture.resize(self._size, Image.Resampling.BICUBIC)
        augmented = Image.fromarray(self.augment(np.asarray(picture)))
        return _normalise(plain), _normalise(self._finish(augmented))

    def augment(self, image: Bytes) -> Bytes:
        """Some of the ten operations in random order, on a crop (H, W, 3) of any size."""
        count = self.random.randint(self.config.min_operations, self.config.max_operations)
        for operation in self.random.sample(self.operations, count):
            image = operation(image)
        return image

    def contrast(self, image: Bytes) -> Bytes:
        values = 128.0 + self._between(self.config.contrast) * (np.arange(256, dtype=np.float32) - 128.0)
        return _bytes(cv2.LUT(image, np.clip(np.rint(values), 0, 255).astype(np.uint8)))

    def blur(self, image: Bytes) -> Bytes:
        return _bytes(cv2.GaussianBlur(image, (5, 5), self._between(self.config.blur_sigma)))

    def crop_vertical(self, image: Bytes) -> Bytes:
        first, last = self._cut(self.config.crop_vertical, image.shape[0])
        return _resized(image[first:last], image)

    def crop_horizontal(self, image: Bytes) -> Bytes:
        first, last = self._cut(self.config.crop_horizontal, image.shape[1])
        return _resized(image[:, first:last], image)

    def sharpen(self, image: Bytes) -> Bytes:
        alpha, lightness = (
            self._between(self.config.sharpen_alpha),
            self._between(self.config.sharpen_lightness),
        )
        kernel = np.full((3, 3), -alpha, np.float32)
        kernel[1, 1] = 1.0 - alpha + alpha * (8.0 + lightness)
        return _bytes(cv2.filter2D(image, -1, kernel))

    def rotate(self, image: Bytes) -> Bytes:
        height, width = image.shape[:2]
        angle = math.radians(self._between(self.config.rotate_degrees))
        cosine, sine = math.cos(angle), math.sin(angle)
        new_width = math.ceil(round(abs(cosine) * (width - 1) + abs(sine) * (height - 1) + 1, 6))
        new_height = math.ceil(round(abs(sine) * (width - 1) + abs(cosine) * (height - 1) + 1, 6))
        x, y = (width - 1) / 2, (height - 1) / 2
        matrix = np.array(
            [
                [cosine, -sine, (new_width - 1) / 2 - cosine * x + sine * y],
                [sine, cosine, (new_height - 1) / 2 - sine * x - cosine * y],
            ]
        )
        return _bytes(cv2.warpAffine(image, matrix, (new_width, new_height), flags=cv2.INTER_LINEAR))

    def piecewise_affine(self, image: Bytes) -> Bytes:
        height, width = image.shape[:2]
        if min(height, width) <= 1:
            return image
        scale = self._between(self.config.piecewise_scale)
        normal = np.array([self.random.gauss(0.0, scale) for _ in range(32)], np.float32)
        shift = normal.reshape(16, 2) * np.array([width, height], np.float32)  # of the 4 x 4 control points
        x, column, u = _thirds(width)
        y, line, v = _thirds(height)
        # Each cell is two triangles; the one at its end is seen from there.
        lower = u + v[:, None] >= 1.0
        corner = line[:, None] * 4 + column + 5 * lower
        turn = np.where(lower, -1, 1)
        along, down = np.abs(u - lower)[..., None], np.abs(v[:, None] - lower)[..., None]
        start = shift.take(corner, axis=0)
        moved = start + (shift.take(corner + turn, axis=0) - start) * along
        moved += (shift.take(corner + 4 * turn, axis=0) - start) * down
        return _bytes(
            cv2.remap(
                image,
                moved[..., 0] + x,
                moved[..., 1] + y[:, None],
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
        )

    def perspective(self, image: Bytes) -> Bytes:
        height, width = image.shape[:2]
        scale = self._between(self.config.perspective_scale)
        corners = ((0, 0), (1, 0), (1, 1), (0, 1))
        points = []
        for across, down in corners:
            inward = [abs(self.random.gauss(0.0, scale)) % 0.5 for _ in range(2)]
            points.append(
                (
                    (across + inward[0] * (1 - 2 * across)) * width,
                    (down + inward[1] * (1 - 2 * down)) * height,
                )
            )
        new_width = max(2, int(max(math.dist(points[0], points[1]), math.dist(points[3], points[2]))))
        new_height = max(2, int(max(math.dist(points[0], points[3]), math.dist(points[1], points[2]))))
        target = [(across * new_width, down * new_height) for across, down in corners]
        # From corners of pixels to their centres, where OpenCV's coordinates are whole numbers.
        matrix = cv2.getPerspectiveTransform(
            np.array(points, np.float32) - np.float32(0.5), np.array(target, np.float32) - np.float32(0.5)
        )
        size = (new_width, new_height)
        warped = cv2.warpPerspective(
            image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        return _resized(_bytes(warped), image)

    def solarize(self, image: Bytes) -> Bytes:
        values = np.arange(256)
        above = values >= self._between(self.config.solarize_threshold)
        table = np.where(above == (self.random.random() < 0.5), 255 - values, values).astype(np.uint8)
        return _bytes(cv2.LUT(image, table))

    def grayscale(self, image: Bytes) -> Bytes:
        alpha = self._between(self.config.grayscale_alpha)
        gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return _bytes(cv2.addWeighted(image, 1.0 - alpha, gray, alpha, 0.0))

    def _finish(self, picture: Image.Image) -> Image.Image:
        """What follows the sampled operations, by Pillow."""
        picture = picture.resize(self._size, Image.Resampling.BICUBIC)
        if self.random.random() < self.config.jitter_probability:
            brightness, contrast, saturation, hue = self.config.jitter
            parts: list[Callable[[Image.Image], Image.Image]] = [
                lambda image: ImageEnhance.Brightness(image).enhance(self._factor(brightness)),
                lambda image: ImageEnhance.Contrast(image).enhance(self._factor(contrast)),
                lambda image: ImageEnhance.Color(image).enhance(self._factor(saturation)),
                lambda image: _turned(image, self._between((-hue, hue))),
            ]
            for part in self.random.sample(parts, len(parts)):
                picture = part(picture)
        if self.random.random() < self.config.grayscale_probability:
            picture = picture.convert("L").convert("RGB")
        return picture

    def _between(self, bounds: tuple[float, float]) -> float:
        return self.random.uniform(*bounds)

    def _factor(self, strength: float) -> float:
        return self.random.uniform(max(0.0, 1.0 - strength), 1.0 + strength)

    def _cut(self, bounds: tuple[float, float], length: int) -> tuple[int, int]:
        """First pixel kept, and the one after the last."""
        first = min(round(self._between(bounds) * length), length - 1)
        return first, max(first + 1, length - round(self._between(bounds) * length))


def _thirds(length: int) -> tuple[View, NDArray[np.int64], View]:
    """Of each pixel along a side: its place, the third of the side that it is in, and where in that."""
    place = np.arange(length, dtype=np.float32)
    thirds = (place + np.float32(0.5)) * np.float32(3.0 / length)
    cell = np.minimum(thirds.astype(np.int64), 2)
    return place, cell, thirds - cell.astype(np.float32)


def _resized(part: Bytes, image: Bytes) -> Bytes:
    """A part of an image at the size of the whole."""
    return _bytes(cv2.resize(part, image.shape[1::-1], interpolation=cv2.INTER_LINEAR))


def _turned(picture: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(turns * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def _normalise(picture: Image.Image) -> View:
    view = np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1), dtype=np.float32)
    view *= np.float32(1 / 127.5)
    view -= np.float32(1.0)
    return view


def _bytes(image: object) -> Bytes:
    """What OpenCV gives back, as the type that it is."""
    assert isinstance(image, np.ndarray)
    assert image.dtype == np.uint8
    return image
