"""OpenCV as decoder: any format that it knows, to colours of 8 bits, without a word on standard error."""

from __future__ import annotations

import threading

import cv2
import numpy as np
from numpy.typing import NDArray

_SILENT = threading.Lock()  # OpenCV has one level of logging for all threads


def decode(image: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """(H, W, 3) blue first, without alpha, of the first frame or page; None if OpenCV cannot decode it.

    EXIF orientation is not applied.
    """
    logging = cv2.utils.logging
    with _SILENT:
        level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)
        try:
            pixels = cv2.imdecode(image, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:  # damaged, or more pixels than OpenCV takes
            return None
        finally:
            logging.setLogLevel(level)
    return None if pixels is None else np.asarray(pixels, np.uint8)
