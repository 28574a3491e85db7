"""Animated PNGs as still ones, refused where they are damaged.

Of an animated PNG, the decoders pass over wrong checksums, and leave the rows that a damaged stream lacks
uninitialised; of others they refuse both. Source: W3C PNG, third edition.
"""

from __future__ import annotations

import zlib

_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_WHOLE = ((0, 0, 1, 1),)  # column and row of the first pixel, steps across and down


def still_png(image: bytes) -> bytes | None:
    """An animated PNG without its animation, any other image as it is; None: an animated PNG that is damaged.

    Every chunk must have its checksum, and the pixel data must unpack to exactly the rows of the image.

    Args:
        image: an image whose header and chunks `probe` found good.
    """
    if not image.startswith(b"\x89PNG") or b"acTL" not in image:
        return image
    kept, pixels, at = [image[:8]], [], 8
    while at < len(image):
        end = at + 12 + int.from_bytes(image[at : at + 4], "big")
        kind = image[at + 4 : at + 8]
        if zlib.crc32(image[at + 4 : end - 4]) != int.from_bytes(image[end - 4 : end], "big"):
            return None
        if kind not in _ANIMATION:
            kept.append(image[at:end])
        if kind == b"IDAT":
            pixels.append(image[at + 8 : end - 4])
        at = end
        if kind == b"IEND":
            break
    expected = _unpacked_size(image)
    unpacking = zlib.decompressobj()
    try:
        unpacked = len(unpacking.decompress(b"".join(pixels), expected + 1))
        if unpacked == expected and not unpacking.eof:  # the checksum behind the last row
            unpacked += len(unpacking.decompress(unpacking.unconsumed_tail, 1))
    except zlib.error:
        return None
    if unpacked != expected or not unpacking.eof:
        return None
    return b"".join(kept)


def _unpacked_size(image: bytes) -> int:
    """Bytes of all rows, each with its filter type."""
    width, height = int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")
    bits = image[24] * _CHANNELS[image[25]]
    total = 0
    for left, top, across, down in _PASSES if image[28] else _WHOLE:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total
