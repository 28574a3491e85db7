"""Status, height and width of one encoded image from its bytes: the Python form of csrc/image_headers.cpp.

The two files have the same functions and give the same results: change them together.
Sources: ITU T.81 (JPEG), W3C PNG, BITMAPINFOHEADER, GIF89a, RFC 9649 (WebP).
"""

from __future__ import annotations

from typing import NoReturn

_OK, _EMPTY, _NOT_AN_IMAGE, _TRUNCATED, _TOO_LARGE, _INVALID, _UNSUPPORTED = range(7)  # probe.Status

Size = tuple[int, int]  # height, width


class Verdict(Exception):
    """Ends the reading of an image that is not OK."""

    def __init__(self, status: int, size: Size = (0, 0)) -> None:
        self.status, self.size = status, size


def read_header(image: bytes, max_pixels: int) -> tuple[int, int, int]:
    """Status (a `probe.Status`), height and width of one encoded image."""
    try:
        return (_OK, *_dispatch(Reader(image), max_pixels))
    except Verdict as verdict:
        return (verdict.status, *verdict.size)


def _dispatch(image: Reader, max_pixels: int) -> Size:
    if image.size == 0:
        raise Verdict(_EMPTY)
    if image.starts_with(b"\xff\xd8"):
        return _jpeg(image, max_pixels)
    if image.starts_with(b"\x89PNG\r\n\x1a\n"):
        return _png(image, max_pixels)
    if image.starts_with(b"GIF87a") or image.starts_with(b"GIF89a"):
        return _gif(image, max_pixels)
    if image.starts_with(b"RIFF") and image.starts_with(b"WEBP", 8):
        return _webp(image, max_pixels)
    if image.starts_with(b"BM"):
        return _bmp(image, max_pixels)
    raise Verdict(_NOT_AN_IMAGE)


class Reader:
    """Bytes read with a check: beyond the end, the image is truncated."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def starts_with(self, text: bytes, at: int = 0) -> bool:
        """Whether the bytes at `at` are these."""
        return self.data.startswith(text, at)

    def need(self, at: int, count: int) -> None:
        """Ends the reading unless so many bytes are at `at`."""
        if at + count > self.size:
            raise Verdict(_TRUNCATED)

    def find_ff(self, at: int) -> int:
        """The place of the next 0xFF."""
        found = self.data.find(b"\xff", at)
        if found < 0:
            raise Verdict(_TRUNCATED)
        return found

    def little(self, at: int, count: int) -> int:
        """The number in these bytes, the lowest first."""
        self.need(at, count)
        return int.from_bytes(self.data[at : at + count], "little")

    def big(self, at: int, count: int) -> int:
        """The number in these bytes, the highest first."""
        self.need(at, count)
        return int.from_bytes(self.data[at : at + count], "big")


def invalid() -> NoReturn:
    """Ends the reading: the header contradicts itself."""
    raise Verdict(_INVALID)


def checked(height: int, width: int, max_pixels: int) -> Size:
    """The size, if it is allowed."""
    if height == 0 or width == 0:
        invalid()
    if height * width > max_pixels:
        raise Verdict(_TOO_LARGE, (height, width))
    return height, width


def _jpeg(image: Reader, max_pixels: int) -> Size:
    """Walks the markers to the end of the image; what follows it is ignored, as decoders do.

    Up to the first scan, segment must follow segment: libjpeg would search for the next one, DALI's parser
    refuses the file.
    """
    size: Size | None = None
    scanned = False
    at = 2
    while True:
        if scanned:
            at = image.find_ff(at)
        if image.big(at, 1) != 0xFF:
            invalid()
        while image.big(at, 1) == 0xFF:
            at += 1
        marker = image.big(at, 1)
        at += 1
        if marker <= 1 or 0xD0 <= marker <= 0xD7:  # stuffed byte, TEM, restart: no segment
            if not scanned:
                invalid()
            continue
        if marker == 0xD8:
            invalid()
        if marker == 0xD9:  # end of image
            if size is None or not scanned:
                invalid()
            return size
        length = image.big(at, 2)
        if length < 2:
            invalid()
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            if size is not None:
                invalid()
            size = _jpeg_frame(image, at, length, marker, max_pixels)
        if marker == 0xDA:  # start of scan
            if size is None:
                invalid()
            scanned = True
        image.need(at, length)
        at += length


def _jpeg_frame(image: Reader, at: int, length: int, marker: int, max_pixels: int) -> Size:
    precision, components = image.big(at + 2, 1), image.big(at + 7, 1)
    if length != 8 + 3 * components:
        invalid()
    # baseline, extended, progressive, and the arithmetic-coded forms of the last two
    if marker not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA) or precision != 8 or components not in (1, 3, 4):
        raise Verdict(_UNSUPPORTED)
    for component in range(components):
        sampling = image.big(at + 9 + 3 * component, 1)
        if not (1 <= sampling >> 4 <= 4 and 1 <= sampling & 15 <= 4):
            invalid()
    return checked(image.big(at + 3, 2), image.big(at + 5, 2), max_pixels)


_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type


def _png(image: Reader, max_pixels: int) -> Size:
    image.need(8, 25)
    if image.big(8, 4) != 13 or not image.starts_with(b"IHDR", 12):
        invalid()
    width, height = image.big(16, 4), image.big(20, 4)
    depth, colour = image.big(24, 1), image.big(25, 1)
    if width >= 2**31 or height >= 2**31 or depth not in _PNG_DEPTHS.get(colour, ()):
        invalid()
    compression, filtering, interlace = image.big(26, 1), image.big(27, 1), image.big(28, 1)
    if compression != 0 or filtering != 0 or interlace > 1:
        invalid()
    size = checked(height, width, max_pixels)
    has_pixels = False
    at = 33
    while not image.starts_with(b"IEND", at + 4):
        length = image.big(at, 4)
        image.need(at, 12 + length)
        if not all(65 <= letter & 0xDF <= 90 for letter in image.data[at + 4 : at + 8]):
            invalid()
        has_pixels |= image.starts_with(b"IDAT", at + 4)
        at += 12 + length
    if not has_pixels:
        invalid()
    image.need(at, 12)
    return size


def _gif(image: Reader, max_pixels: int) -> Size:
    """Walks the blocks to the trailer."""
    image.need(0, 13)
    size = checked(image.little(8, 2), image.little(6, 2), max_pixels)
    at = 13 + _gif_table(image.little(10, 1))
    has_frame = False
    while True:
        block = image.little(at, 1)
        if block == 0x3B:  # trailer
            if not has_frame:
                invalid()
            return size
        if block == 0x2C:  # frame: position and size, flags, colour table, code size
            at += 11 + _gif_table(image.little(at + 9, 1))
            has_frame = True
        elif block == 0x21:  # extension: label
            at += 2
        else:
            invalid()
        while (length := image.little(at, 1)) != 0:
            at += 1 + length
        at += 1


def _gif_table(flags: int) -> int:
    """Bytes of the colour table that the flags announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _webp(image: Reader, max_pixels: int) -> Size:
    image.need(0, 20)
    end = 8 + image.little(4, 4)
    image.need(0, end)
    if image.starts_with(b"VP8X", 12):
        size = _webp_extended(image, max_pixels)
    elif image.starts_with(b"VP8 ", 12):
        size = _webp_lossy(image, max_pixels)
    elif image.starts_with(b"VP8L", 12):
        size = _webp_lossless(image, max_pixels)
    else:
        invalid()
    # DALI's parser refuses a file that announces EXIF data and has none.
    announces_exif = image.starts_with(b"VP8X", 12) and bool(image.little(20, 1) & 8)
    has_pixels = has_exif = False
    at = 12
    while at + 8 <= end:
        length = image.little(at + 4, 4)
        if at + 8 + length > end:
            raise Verdict(_TRUNCATED)
        has_pixels |= any(image.starts_with(kind, at) for kind in (b"VP8 ", b"VP8L", b"ANMF"))
        has_exif |= image.starts_with(b"EXIF", at)
        at += 8 + length + (length & 1)
    if not has_pixels or (announces_exif and not has_exif):
        invalid()
    return size


def _webp_extended(image: Reader, max_pixels: int) -> Size:
    if image.little(16, 4) < 10:
        invalid()
    return checked(image.little(27, 3) + 1, image.little(24, 3) + 1, max_pixels)


def _webp_lossy(image: Reader, max_pixels: int) -> Size:
    tag = image.little(20, 3)
    inter_frame, profile, shown, partition = tag & 1, tag >> 1 & 7, tag >> 4 & 1, tag >> 5
    if inter_frame or profile > 3 or not shown or partition >= image.little(16, 4):
        invalid()
    if image.big(23, 3) != 0x9D012A:
        invalid()
    return checked(image.little(28, 2) & 0x3FFF, image.little(26, 2) & 0x3FFF, max_pixels)


def _webp_lossless(image: Reader, max_pixels: int) -> Size:
    bits = image.little(21, 4)
    if image.little(20, 1) != 0x2F or bits >> 29 != 0:  # signature, version
        invalid()
    return checked((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, max_pixels)


def _bmp(image: Reader, max_pixels: int) -> Size:
    offset, header = image.little(10, 4), image.little(14, 4)
    if header == 12:  # OS/2
        width, height, depth, compression = image.little(18, 2), image.little(20, 2), image.little(24, 2), 0
    elif 40 <= header <= 124:
        width, height = _signed(image.little(18, 4)), abs(_signed(image.little(22, 4)))  # negative: top-down
        depth, compression = image.little(28, 2), image.little(30, 4)
    else:
        invalid()
    if width < 0 or height == 2**31 or offset < 14 + header:
        invalid()
    if compression > 3:
        raise Verdict(_UNSUPPORTED)
    run_length = compression in (1, 2)
    depths = ((1, 4, 8, 16, 24, 32), (8,), (4,), (16, 32))[compression]
    if depth not in depths:
        invalid()
    size = checked(height, width, max_pixels)
    image.need(offset, 1 if run_length else (width * depth + 31) // 32 * 4 * height)
    return size


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
