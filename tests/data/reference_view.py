"""The guidance view, literally: one operation after the other on bytes, which programs are checked against.

The ten operations follow imgaug, the end of the chain PIL and torchvision's ColorJitter on PIL images.
"""

import cv2
import numpy as np
from PIL import Image, ImageEnhance

from lmim_fast.data.guidance.parameters import GuidanceParameters, Jitter, Operation


def reference_guidance(
    image: np.ndarray, parameters: GuidanceParameters, row: int = 0, size=(32, 128)
) -> np.ndarray:
    """(H, W, 3) uint8 crop -> (32, 128, 3) uint8 view of the sample `row`."""
    for operation in parameters.order[row]:
        if operation >= 0:
            image = OPERATIONS[Operation(operation)](image, parameters, row)
            assert image.dtype == np.uint8
    picture = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    if parameters.jitter[row]:
        for part in parameters.jitter_order[row]:
            picture = jitter(picture, Jitter(part), parameters.jitter_factors[row, part])
    if parameters.gray[row]:
        picture = picture.convert("L").convert("RGB")
    return np.asarray(picture)


def reference_plain(image: np.ndarray, size=(32, 128)) -> np.ndarray:
    """The released plain view before normalisation: PIL's bicubic resize."""
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _contrast(image, parameters, row):
    return _bytes(128.0 + parameters.contrast[row] * (image.astype(np.float64) - 128.0))


def _blur(image, parameters, row):
    return cv2.GaussianBlur(image, (5, 5), parameters.blur_sigma[row], borderType=cv2.BORDER_REFLECT_101)


def _crop(image, shares, axis):
    length = image.shape[axis]
    first, last = (int(np.rint(share * length)) for share in shares)
    first = min(first, length - 1)
    last = min(last, length - first - 1)
    kept = image.take(range(first, length - last), axis=axis)
    return cv2.resize(np.ascontiguousarray(kept), image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def _crop_vertical(image, parameters, row):
    return _crop(image, parameters.crop_vertical[row], axis=0)


def _crop_horizontal(image, parameters, row):
    return _crop(image, parameters.crop_horizontal[row], axis=1)


def _sharpen(image, parameters, row):
    alpha, lightness = parameters.sharpen_alpha[row], parameters.sharpen_lightness[row]
    effect = np.full((3, 3), -1.0)
    effect[1, 1] = 8.0 + lightness
    identity = np.zeros((3, 3))
    identity[1, 1] = 1.0
    return cv2.filter2D(image, -1, (1 - alpha) * identity + alpha * effect, borderType=cv2.BORDER_REFLECT_101)


def _rotate(image, parameters, row):
    height, width = image.shape[:2]
    angle = np.deg2rad(parameters.angle[row])
    cosine, sine = np.cos(angle), np.sin(angle)
    new_width = int(np.ceil(np.round(abs(cosine) * (width - 1) + abs(sine) * (height - 1) + 1, 6)))
    new_height = int(np.ceil(np.round(abs(sine) * (width - 1) + abs(cosine) * (height - 1) + 1, 6)))
    turn = np.array([[cosine, -sine], [sine, cosine]])  # y points down: clockwise
    centre, new_centre = np.array([width - 1, height - 1]) / 2, np.array([new_width - 1, new_height - 1]) / 2
    matrix = np.hstack([turn, (new_centre - turn @ centre)[:, None]])
    return cv2.warpAffine(image, matrix, (new_width, new_height), flags=cv2.INTER_LINEAR, borderValue=0)


def _piecewise(image, parameters, row):
    height, width = image.shape[:2]
    if min(height, width) <= 1:
        return image
    y, x = np.mgrid[0:height, 0:width] + 0.5  # pixel centres; the control points stand at thirds of the side
    u, v = x / width * 3, y / height * 3
    column, line = np.minimum(u.astype(int), 2), np.minimum(v.astype(int), 2)
    u, v = (u - column)[..., None], (v - line)[..., None]
    grid = parameters.piecewise[row]
    top_left, top_right = grid[line, column], grid[line, column + 1]
    bottom_left, bottom_right = grid[line + 1, column], grid[line + 1, column + 1]
    upper = top_left + u * (top_right - top_left) + v * (bottom_left - top_left)
    lower = bottom_right + (1 - u) * (bottom_left - bottom_right) + (1 - v) * (top_right - bottom_right)
    shift = np.where(u + v < 1, upper, lower)
    map_x = (x + shift[..., 0] * width).astype(np.float32)
    map_y = (y + shift[..., 1] * height).astype(np.float32)
    return cv2.remap(image, map_x - 0.5, map_y - 0.5, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _perspective(image, parameters, row):
    height, width = image.shape[:2]
    side = np.array([width, height])
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    inward = parameters.perspective[row]
    points = (corners + inward * (1 - 2 * corners)) * side
    top, bottom = points[1] - points[0], points[2] - points[3]
    left, right = points[3] - points[0], points[2] - points[1]
    new_width = max(2, int(max(np.hypot(*top), np.hypot(*bottom))))
    new_height = max(2, int(max(np.hypot(*left), np.hypot(*right))))
    target = corners * np.array([new_width, new_height])
    # From corners of pixels to their centres, where OpenCV's coordinates are whole numbers.
    matrix = cv2.getPerspectiveTransform((points - 0.5).astype(np.float32), (target - 0.5).astype(np.float32))
    warped = cv2.warpPerspective(
        image, matrix, (new_width, new_height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return cv2.resize(warped, (width, height), interpolation=cv2.INTER_LINEAR)


def _solarize(image, parameters, row):
    above = image >= parameters.solarize_threshold[row]
    return np.where(above == parameters.solarize_above[row], 255 - image, image).astype(np.uint8)


def _grayscale(image, parameters, row):
    alpha = parameters.grayscale_alpha[row]
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float64)
    return _bytes((1 - alpha) * image + alpha * gray)


OPERATIONS = {
    Operation.CONTRAST: _contrast,
    Operation.BLUR: _blur,
    Operation.CROP_VERTICAL: _crop_vertical,
    Operation.CROP_HORIZONTAL: _crop_horizontal,
    Operation.SHARPEN: _sharpen,
    Operation.ROTATE: _rotate,
    Operation.PIECEWISE_AFFINE: _piecewise,
    Operation.PERSPECTIVE: _perspective,
    Operation.SOLARIZE: _solarize,
    Operation.GRAYSCALE: _grayscale,
}


def jitter(picture: Image.Image, part: Jitter, factor: float) -> Image.Image:
    if part == Jitter.BRIGHTNESS:
        return ImageEnhance.Brightness(picture).enhance(factor)
    if part == Jitter.CONTRAST:
        return ImageEnhance.Contrast(picture).enhance(factor)
    if part == Jitter.SATURATION:
        return ImageEnhance.Color(picture).enhance(factor)
    hue, saturation, value = picture.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int64) + int(np.rint(factor * 255))) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")
