"""Which encoded images can be decoded, and how large they are: read from their headers, before decoding."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmim_fast.config import MAX_PIXELS, MAX_PIXELS_LIMIT
from lmim_fast.data.store import image_headers, rare_formats
from lmim_fast.native import native


class Status(enum.IntEnum):
    """Verdict on one record; csrc/image_headers.h and image_headers.py use the same numbers."""

    OK = 0
    EMPTY = 1
    """No bytes: the key is missing, or its value is empty."""
    NOT_AN_IMAGE = 2
    """Starts like none of JPEG, PNG, BMP, GIF and WebP, nor like what `rare_formats` knows the size of."""
    TRUNCATED = 3
    """Ends before its format says it does."""
    TOO_LARGE = 4
    """Claims more pixels than allowed."""
    INVALID = 5
    """A known format whose header contradicts itself or names a zero size."""
    UNSUPPORTED = 6
    """A variant that the usual decoders refuse (lossless, 12-bit or hierarchical JPEG, JPEG inside BMP, float
    TIFF)."""
    UNDECODABLE = 7
    """The header is good, the pixel data is not: never a verdict of `probe`, which does not read it."""


class Probe(NamedTuple):
    """Verdicts on a batch. Height and width (before EXIF rotation) are 0 unless status is OK or TOO_LARGE."""

    status: NDArray[np.uint8]
    height: NDArray[np.int32]
    width: NDArray[np.int32]


ProbeForm = Callable[[Sequence[bytes], int], tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.int32]]]


def probe(images: Sequence[bytes], max_pixels: int = MAX_PIXELS) -> Probe:
    """Read the headers of encoded images.

    Pixel data is not decoded, so a damaged but complete file can pass; a file cut short does not.

    Args:
        images:     B encoded images: bytes, or any contiguous buffer (memoryview, uint8 array).
        max_pixels: height x width allowed, 1 .. 2^40.
    Returns:
        Status, height and width, (B,) each.
    Raises:
        ValueError: max_pixels out of range.
        TypeError:  an image is not a buffer.
    """
    check_max_pixels(max_pixels)
    found = Probe(*_form()(images, max_pixels))
    rare_formats.complete(*found, lambda row: bytes(memoryview(images[row])), max_pixels)
    return found


def check_max_pixels(max_pixels: int) -> None:
    """ValueError unless `max_pixels` is in 1 .. 2^40."""
    if not 1 <= max_pixels <= MAX_PIXELS_LIMIT:
        raise ValueError(f"max_pixels must be in [1, 2^40], got {max_pixels}")


def _form() -> ProbeForm:
    module = native()
    return probe_in_python if module is None else module.probe


def probe_in_python(
    images: Sequence[bytes], max_pixels: int
) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.int32]]:
    """The Python form of `probe`; its results equal the native form's."""
    verdicts = [image_headers.read_header(bytes(memoryview(image)), max_pixels) for image in images]
    status, height, width = np.array(verdicts, dtype=np.int64).reshape(-1, 3).T
    return status.astype(np.uint8), height.astype(np.int32), width.astype(np.int32)
