"""Formats beside those of `image_headers`: their names, and the sizes of the ones that OpenCV decodes.

Records of these are few, so there is one form, in Python, which is asked where both forms of `probe` found
none of their formats. Sources: TIFF 6.0 and the BigTIFF design, ITU T.800 (JPEG 2000), netpbm's manual pages,
ISO 14496-12 and 23008-12 (the boxes of AVIF).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.store.image_headers import Reader, Size, Verdict, checked, invalid

_OK, _NOT_AN_IMAGE, _UNSUPPORTED = 0, 2, 6  # probe.Status

_SPACE = rb"(?:\s|#[^\r\n]*[\r\n])*"  # comments too
_NETPBM = re.compile(rb"P[1-6]\s" + _SPACE + rb"(\d{1,10})\s" + _SPACE + rb"(\d{1,10})\s")
_SIGNATURES: tuple[tuple[str, bytes], ...] = (
    ("TIFF", rb"II[*+]\0|MM\0[*+]"),
    ("JPEG 2000", rb"\0\0\0\x0cjP  \r\n\x87\n|\xffO\xffQ"),
    ("PBM", rb"P[14]\s" + _SPACE + rb"\d"),
    ("PGM", rb"P[25]\s" + _SPACE + rb"\d"),
    ("PPM", rb"P[36]\s" + _SPACE + rb"\d"),
    ("AVIF", rb"....ftyp(?:....)*?avi[fs]"),
    ("JPEG XL", rb"\xff\n|\0\0\0\x0cJXL \r\n\x87\n"),
    ("HEIC", rb"....ftyp(?:....)*?(?:hei[cxms]|hev[cxms]|mif1|msf1)"),
    ("PSD", rb"8BPS\0[\x01\x02]"),
    ("ICO", rb"\0\0[\x01\x02]\0[^\0]\0...\0"),
    ("PDF", rb"%PDF-"),
    ("EXR", rb"v/1\x01"),
    ("HDR", rb"#\?(?:RADIANCE|RGBE)"),
    ("DDS", rb"DDS \x7c\0\0\0"),
    ("PFM", rb"P[Ff]\s+\d"),
    ("PAM", rb"P7\n"),
    ("SVG", rb"(?:\xef\xbb\xbf)?\s*<(?i:(?!!doctype\s+html))(?:svg|[?!].*?<svg)[\s>]"),
)
_NO_IMAGES: tuple[tuple[str, bytes], ...] = (
    ("an HTML page", rb"(?:\xef\xbb\xbf)?(?i:\s*<(?:!doctype\s+html|html)[\s>])"),
    ("gzip-compressed data", rb"\x1f\x8b\x08"),
    ("a ZIP archive", rb"PK\x03\x04"),
)
_START = 1024  # bytes in which a format must show
_PATTERNS = [(name, re.compile(pattern, re.DOTALL)) for name, pattern in _SIGNATURES]
_OTHERS = [(name, re.compile(pattern, re.DOTALL)) for name, pattern in _NO_IMAGES]


def format_name(image: bytes) -> str | None:
    """The format that the bytes start like, if it is one of this file's."""
    start = image[:_START]
    if start.startswith(b"\0\0\0") and start[4:8] == b"ftyp":
        start = start[: start[3]]  # the brands, and nothing behind them
    return next((name for name, pattern in _PATTERNS if pattern.match(start)), None)


def described(image: bytes) -> str | None:
    """What is not decoded, in the words of a report; None: nothing is known of the bytes."""
    name = format_name(image)
    if name is not None:
        which = "of a kind that" if name in _PARSERS else "which"
        return f"{name} image {which} is not decoded: convert it to PNG or JPEG"
    start = image[:_START]
    other = next((name for name, pattern in _OTHERS if pattern.match(start)), None)
    return None if other is None else f"not an image but {other}"


def complete(
    status: NDArray[np.uint8],
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    image_of: Callable[[int], bytes],
    max_pixels: int,
) -> None:
    """In place: status and size of the images that OpenCV decodes, where `probe`'s forms found no image."""
    for row in np.flatnonzero(status == _NOT_AN_IMAGE).tolist():
        image = image_of(row)
        parse = _PARSERS.get(format_name(image) or "")
        if parse is not None:
            try:
                status[row], size = _OK, parse(Reader(image), max_pixels)
            except Verdict as verdict:
                status[row], size = verdict.status, verdict.size
            heights[row], widths[row] = (min(side, 2**31 - 1) for side in size)


def _tiff(image: Reader, max_pixels: int) -> Size:
    """Of the first page, turned as its orientation says, because the decoder turns it."""
    number = image.little if image.starts_with(b"II") else image.big
    is_big = number(2, 2) == 43
    word = 8 if is_big else 4  # bytes of offsets and counts of values
    count_size = 8 if is_big else 2
    page = number(8 if is_big else 4, word)
    tags: dict[int, int] = {}
    for entry in range(number(page, count_size)):
        at = page + count_size + entry * (4 + 2 * word)
        tag, kind, values = number(at, 2), number(at + 2, 2), number(at + 4, word)
        value = at + 4 + word
        size = {1: 1, 3: 2, 4: 4, 16: 8}.get(kind, 0)
        if size == 0 or values == 0 or tag in tags:  # of a tag that comes again, the decoder takes the first
            continue
        if values * size > word:
            value = number(value, word)
        tags[tag] = number(value, size)
    width, height = tags.get(256, 0), tags.get(257, 0)
    if tags.get(339, 1) in (3, 5, 6) or tags.get(258, 1) > 16:  # floating point or complex; 32 bits and more
        raise Verdict(_UNSUPPORTED)
    checked(tags.get(323, 1), tags.get(322, 1), max_pixels)  # a tile is decoded whole
    if tags.get(274, 1) in (5, 6, 7, 8):
        width, height = height, width
    return checked(height, width, max_pixels)


def _jpeg2000(image: Reader, max_pixels: int) -> Size:
    at = 0
    if not image.starts_with(b"\xff\x4f\xff\x51"):
        while not image.starts_with(b"jp2c", at + 4):
            length = image.big(at, 4)
            if length == 1:
                length = image.big(at + 8, 8)
            if length < 8:
                invalid()
            at += length
        at += 16 if image.big(at, 4) == 1 else 8
    if not image.starts_with(b"\xff\x4f\xff\x51", at):
        invalid()
    right, bottom, left, top = (image.big(at + 8 + 4 * place, 4) for place in range(4))
    if left >= right or top >= bottom:
        invalid()
    fewest = 1 if at else 3  # OpenCV takes a codestream without boxes for RGB
    if not fewest <= image.big(at + 40, 2) <= 4:  # components
        raise Verdict(_UNSUPPORTED)
    return checked(bottom - top, right - left, max_pixels)


def _netpbm(image: Reader, max_pixels: int) -> Size:
    found = _NETPBM.match(image.data)
    if found is None:
        invalid()
    return checked(int(found[2]), int(found[1]), max_pixels)


def _avif(image: Reader, max_pixels: int) -> Size:
    """The largest of the sizes that any item or track announces, so that none is decoded unchecked."""
    sizes = [(0, 0)]
    for found in re.finditer(rb"ispe", image.data):
        at = found.start()
        if image.big(at - 4, 4) == 20:
            sizes.append((image.big(at + 12, 4), image.big(at + 8, 4)))
    for found in re.finditer(rb"tkhd", image.data):
        at = found.start() - 4
        end = at + image.big(at, 4)
        if end - at in (92, 104):
            sizes.append((image.big(end - 4, 4) >> 16, image.big(end - 8, 4) >> 16))
    return checked(*max(sizes, key=lambda size: size[0] * size[1]), max_pixels)


_PARSERS: dict[str, Callable[[Reader, int], Size]] = {
    "TIFF": _tiff,
    "JPEG 2000": _jpeg2000,
    "PBM": _netpbm,
    "PGM": _netpbm,
    "PPM": _netpbm,
    "AVIF": _avif,
}
