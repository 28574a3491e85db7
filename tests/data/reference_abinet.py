"""ABINet's augmentation, literally: one operation after the other on bytes, to check programs against.

Geometry, deterioration and colour jitter follow the released code, with the linear one of the four
interpolations that it picks from.
"""

import math

import cv2
import numpy as np
from PIL import Image
from reference_view import jitter

from lmim_fast.data.augment.abinet import AbinetParameters, Deterioration, Geometry
from lmim_fast.data.guidance.parameters import Jitter


def reference_abinet(
    image: np.ndarray, parameters: AbinetParameters, row: int, size=(32, 128), *, noise=False
) -> np.ndarray:
    """(H, W, 3) uint8 crop -> (32, 128, 3) uint8 view of the sample `row`, without its noise unless asked."""
    kind = parameters.geometry[row]
    if kind >= 0:
        image = GEOMETRY[Geometry(kind)](image, parameters, row)
    if parameters.deterioration[row]:
        for part in parameters.deterioration_order[row]:
            if part == Deterioration.MOTION_BLUR:
                image = _motion_blur(image, parameters.blur_length[row], parameters.blur_angle[row])
            elif part == Deterioration.RESCALE:
                image = _rescale(image, parameters.halvings[row])
            elif noise:
                image = _noise(image, parameters.variance[row], row)
    picture = Image.fromarray(image)
    if parameters.jitter[row]:
        for part in parameters.jitter_order[row]:
            picture = jitter(picture, Jitter(part), parameters.jitter_factors[row, part])
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _warp(image, matrix, size):
    return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _rotation(image, parameters, row):
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), parameters.angle[row], 1.0)
    cosine, sine = abs(matrix[0, 0]), abs(matrix[0, 1])
    new_width, new_height = int(height * sine + width * cosine), int(height * cosine + width * sine)
    matrix[0, 2] += (new_width - width) / 2
    matrix[1, 2] += (new_height - height) / 2
    return _warp(image, matrix, (new_width, new_height))


def _affine(image, parameters, row):
    height, width = image.shape[:2]
    turn = math.radians(parameters.angle[row])
    sx, sy = (math.radians(degrees) for degrees in parameters.shear[row])
    a = math.cos(turn - sy) / math.cos(sy)
    b = -math.cos(turn - sy) * math.tan(sx) / math.cos(sy) - math.sin(turn)
    c = math.sin(turn - sy) / math.cos(sy)
    d = -math.sin(turn - sy) * math.tan(sx) / math.cos(sy) + math.cos(turn)
    matrix = np.array([[d, -b, 0.0], [-c, a, 0.0]]) / parameters.scale[row]
    middle = np.array([width / 2, height / 2])
    matrix[:, 2] = middle - matrix[:, :2] @ middle
    corners = [(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)]
    moved = [[int(value) for value in matrix @ [x, y, 1.0]] for x, y in corners]
    box = cv2.boxPoints(cv2.minAreaRect(np.array(moved))).astype(np.int32)
    new_width, new_height = (int(side) for side in box.max(axis=0) - box.min(axis=0))
    matrix[:, 2] += np.array([new_width - width, new_height - height]) / 2
    return _warp(image, matrix, (new_width, new_height))


def _perspective(image, parameters, row):
    height, width = image.shape[:2]
    shift = (parameters.corners[row] * [width, height]).astype(np.int32)
    start = np.array([(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)], np.float32)
    end = start.copy()
    end[:, 0] += shift[:, 0] * [1, -1, -1, 1]
    end[:, 1] += shift[:, 1] * [1, 1, -1, -1]
    matrix = cv2.getPerspectiveTransform(start, end)
    box = cv2.boxPoints(cv2.minAreaRect(end)).astype(np.int32)
    (right, bottom), (left, top) = box.max(axis=0), np.maximum(box.min(axis=0), 0)
    warped = cv2.warpPerspective(
        image, matrix, (int(right), int(bottom)), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return warped[top:, left:]


def _motion_blur(image, length, angle):
    turn = cv2.getRotationMatrix2D((int(length) // 2, int(length) // 2), angle, 1)
    kernel = np.zeros((length, length))
    kernel[length // 2, :] = 1
    kernel = cv2.warpAffine(kernel, turn, (int(length), int(length))) / length
    return cv2.filter2D(image, -1, kernel)


def _rescale(image, halvings):
    if halvings == 0:
        return image
    scaled = cv2.resize(image, (512, 128), interpolation=cv2.INTER_LINEAR)
    for _ in range(halvings):
        scaled = cv2.pyrDown(scaled)
    return cv2.resize(scaled, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def _noise(image, variance, seed):
    noise = np.random.default_rng(seed).normal(0.0, variance**0.5, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


GEOMETRY = {
    Geometry.ROTATION: _rotation,
    Geometry.AFFINE: _affine,
    Geometry.PERSPECTIVE: _perspective,
}
