"""PARSeq's augmentation, literally: PIL's operations one after the other, to check programs against."""

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from lmim_fast.data.augment.parseq import Operation, ParseqParameters

GRAY = (128, 128, 128)


def reference_parseq(
    image: np.ndarray, parameters: ParseqParameters, row: int, size=(32, 128), *, noise=False
) -> np.ndarray:
    """(H, W, 3) uint8 crop -> (32, 128, 3) uint8 view of the sample `row`, without its noise unless asked."""
    picture = Image.fromarray(image)
    for operation, sign in zip(parameters.order[row], parameters.sign[row], strict=True):
        if operation == Operation.POISSON_NOISE:
            picture = _noise(picture, parameters.magnitude, row) if noise else picture
        elif operation >= 0:
            picture = OPERATIONS[Operation(operation)](picture, sign, parameters.magnitude / 10)
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _affine(picture, matrix):
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GRAY
    )


def _posterize(picture, sign, level):
    bits = 4 - int(level * 4)
    return ImageOps.posterize(picture, bits) if bits else Image.new("RGB", picture.size)


def _solarize_add(picture, sign, level):
    table = [min(255, value + min(128, int(level * 110))) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


def _blur(picture, sign, level):
    return picture.filter(ImageFilter.GaussianBlur(round(min(4 * level, max(1, 0.02 * max(picture.size))))))


def _noise(picture, magnitude, seed):
    rate = round(min(4 * magnitude, max(1, 0.2 * max(picture.size)))) | 1
    rng = np.random.default_rng(seed)
    size = (picture.size[1], picture.size[0], 1)
    noise = rng.poisson(rate, size) * rng.choice([-1, 1], size)
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def _enhance(kind):
    return lambda picture, sign, level: kind(picture).enhance(max(0.1, 1 + sign * 0.9 * level))


OPERATIONS = {
    Operation.AUTO_CONTRAST: lambda picture, sign, level: ImageOps.autocontrast(picture),
    Operation.EQUALIZE: lambda picture, sign, level: ImageOps.equalize(picture),
    Operation.INVERT: lambda picture, sign, level: ImageChops.invert(picture),
    Operation.ROTATE: lambda picture, sign, level: picture.rotate(
        sign * 30 * level, Image.Resampling.BILINEAR, expand=True, fillcolor=GRAY
    ),
    Operation.POSTERIZE: _posterize,
    Operation.SOLARIZE: lambda picture, sign, level: ImageOps.solarize(picture, 256 - int(level * 256)),
    Operation.SOLARIZE_ADD: _solarize_add,
    Operation.COLOR: _enhance(ImageEnhance.Color),
    Operation.CONTRAST: _enhance(ImageEnhance.Contrast),
    Operation.BRIGHTNESS: _enhance(ImageEnhance.Brightness),
    Operation.SHEAR_X: lambda picture, sign, level: _affine(picture, (1, sign * 0.9 * level, 0, 0, 1, 0)),
    Operation.SHEAR_Y: lambda picture, sign, level: _affine(picture, (1, 0, 0, sign * 0.2 * level, 1, 0)),
    Operation.TRANSLATE_X: lambda picture, sign, level: _affine(
        picture, (1, 0, sign * 0.1 * level * picture.size[0], 0, 1, 0)
    ),
    Operation.TRANSLATE_Y: lambda picture, sign, level: _affine(
        picture, (1, 0, 0, 0, 1, sign * 0.3 * level * picture.size[1])
    ),
    Operation.GAUSSIAN_BLUR: _blur,
}
