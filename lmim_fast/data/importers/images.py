"""What an import does to pixels: orientation, vertical crops, boxes of a page."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lmim_fast.data import decoding
from lmim_fast.data.importers.entries import Refused

VERTICAL_RATIO = 1.5
"""Height over width from which a crop is vertical, as in PaddleOCR's recogniser."""
JPEG_QUALITY = 95
MAX_PIXELS = 2**26
"""Images that claim more are rejected, and never decoded; nor is a crop of more made."""
_TIMES_THE_PAGE = 4  # a box has a larger area only where its corners are not meant
_ORIENTATION_TAG = 0x0112
_SHORT = 3

Pixels = NDArray[np.uint8]


def is_vertical(height: int, width: int, label: str | None) -> bool:
    """Whether a crop shows a line of text from top to bottom, or from side to side on a turned sign.

    A single character, such as 1, may be as narrow upright. Without a label only the shape says it.
    Source: `get_rotate_crop_image` of PaddleOCR, which goes by the shape alone.
    """
    return height >= VERTICAL_RATIO * width and (label is None or len(label) > 1)


def turn(pixels: Pixels) -> Pixels:
    """Turned by 90 degrees counter-clockwise, so that what was on top is on the left."""
    return np.rot90(pixels)


def decode(image: bytes) -> Pixels:
    """(H, W, 3) as the file has them, blue first; its EXIF orientation is not applied.

    Raises:
        Refused: it does not decode.
    """
    pixels = decoding.decode(np.frombuffer(image, np.uint8))
    if pixels is None:
        raise Refused("does not decode")
    return pixels


def encode(pixels: Pixels, source: bytes) -> bytes:
    """JPEG of quality 95 if the source was JPEG, otherwise PNG.

    Raises:
        Refused: the format cannot hold an image of this size.
    """
    is_jpeg = source.startswith(b"\xff\xd8")
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if is_jpeg else []
    try:
        done, buffer = cv2.imencode(".jpg" if is_jpeg else ".png", np.ascontiguousarray(pixels), options)
    except cv2.error as error:
        raise Refused("cannot be encoded", str(error.err)) from error
    if not done:
        raise Refused("cannot be encoded", f"{pixels.shape[1]} x {pixels.shape[0]}")
    return buffer.tobytes()


def rectify(page: Pixels, points: tuple[tuple[float, float], ...]) -> Pixels:
    """The text in a box of a page as an upright rectangle: PaddleOCR's crop, cubic, edges repeated.

    Its sides are as long as the longer of the box's opposite sides. Of more than four points the smallest
    rectangle around them is taken; corners in counter-clockwise order are put in the other order, so that no
    crop is mirrored.

    Raises:
        Refused: the box has no area, lies outside of the page or is much larger than it.
    """
    quad = np.array(points, np.float32)
    if len(quad) > 4:
        quad = _corners(cv2.boxPoints(cv2.minAreaRect(quad)))
    x, y = quad.T
    if np.dot(x, np.roll(y, -1)) < np.dot(y, np.roll(x, -1)):
        quad = quad[[0, 3, 2, 1]]
    sides = np.linalg.norm(quad - np.roll(quad, -1, axis=0), axis=1)  # top, right, bottom, left
    width, height = int(max(sides[0], sides[2])), int(max(sides[1], sides[3]))
    low, high = quad.min(axis=0), quad.max(axis=0)
    page_height, page_width = page.shape[:2]
    if width < 1 or height < 1 or cv2.contourArea(quad) < 1:
        raise Refused("box without area", str(points)[:100])
    if high[0] <= 0 or high[1] <= 0 or low[0] >= page_width or low[1] >= page_height:
        raise Refused("box outside of the page", str(points)[:100])
    limit = min(_TIMES_THE_PAGE * page_height * page_width, MAX_PIXELS)
    if max(width, height) > 2 * (page_width + page_height) or width * height > limit:
        raise Refused("box larger than the page", str(points)[:100])
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    crop: Any = cv2.warpPerspective(
        page,
        cv2.getPerspectiveTransform(quad, target),
        (width, height),
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(crop, np.uint8)


def _corners(box: Any) -> NDArray[np.float32]:
    """Corners of a rectangle, clockwise from the top left one: left and right ones by height."""
    by_x = np.asarray(box, np.float32)[np.argsort(box[:, 0], kind="stable")]
    left = by_x[:2][np.argsort(by_x[:2, 1], kind="stable")]
    right = by_x[2:][np.argsort(by_x[2:, 1], kind="stable")]
    return np.stack([left[0], right[0], right[1], left[1]])


def orientation(image: bytes) -> int:
    """EXIF orientation of an encoded JPEG, PNG or WebP, 1 .. 8; 1 where there is none that can be read."""
    block = _exif_block(image)
    order = {b"II": "little", b"MM": "big"}.get(block[:2])
    if order is None:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(block[at : at + size], order)  # type: ignore[arg-type]

    first = number(4, 4)
    for entry in range(first + 2, min(first + 2 + 12 * number(first, 2), len(block) - 11), 12):
        if number(entry, 2) == _ORIENTATION_TAG and number(entry + 2, 2) == _SHORT:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _exif_block(image: bytes) -> bytes:
    """The TIFF structure with the EXIF tags; b"" without one."""
    if image.startswith(b"\xff\xd8"):
        at = image.find(b"Exif\0\0", 4)
        if at < 0 or image[at - 4 : at - 2] != b"\xff\xe1":
            return b""
        return image[at + 6 : at - 2 + int.from_bytes(image[at - 2 : at], "big")]
    if image.startswith(b"\x89PNG"):
        at = image.find(b"eXIf", 8)
        return b"" if at < 0 else image[at + 4 : at + 4 + int.from_bytes(image[at - 4 : at], "big")]
    if image.startswith(b"RIFF"):
        at = image.find(b"EXIF", 12)
        block = b"" if at < 0 else image[at + 8 : at + 8 + int.from_bytes(image[at + 4 : at + 8], "little")]
        return block.removeprefix(b"Exif\0\0")
    return b""


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """The pixels turned and mirrored as an EXIF orientation asks."""
    if orientation in (2, 5, 7):
        pixels = pixels[:, ::-1]
    if orientation == 4:
        pixels = pixels[::-1]
    turns = {3: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)  # counter-clockwise
    return np.rot90(pixels, turns)
