"""A database in which every defect that records have sits at a known index among good crops."""

import io
import random
import struct
import zlib

import cv2
import numpy as np
from crop_views import png
from encoded_images import by_opencv, by_pillow, patched, rare_variants, variants
from PIL import Image
from pipeline_runs import database, smooth_image

GOOD = 60
"""Crops beside the defects."""


def of_one_pixel(format_, mode="RGB"):
    data = io.BytesIO()
    Image.new("RGB", (1, 1), (200, 90, 30)).convert(mode).save(data, format_)
    return data.getvalue()


def with_size(format_, height, width):
    """An intact file of a small image whose header claims another size."""
    data = bytearray(by_pillow("P" if format_ == "GIF" else "RGB", format_))
    if format_ == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif format_ == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif format_ == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif format_ == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    else:
        raise ValueError(format_)
    return bytes(data)


def huge_webp():
    """A WebP of the extended form whose canvas is 16,384 pixels wide and high."""
    at = variants()["webp extended"].index(b"VP8X") + 12
    return patched("webp extended", at, (2**14 - 1).to_bytes(3, "little") * 2)


def tiff_with_width(width):
    data = bytearray(rare_variants()["tiff"])
    at = data.index(struct.pack("<HHI", 256, 4, 1)) + 8
    data[at : at + 4] = struct.pack("<I", width)
    return bytes(data)


def jpeg_with_spoilt_tables():
    """A JPEG with an impossible Huffman table: the header is right, the pixels are not."""
    data = cv2.imencode(".jpg", smooth_image(9))[1].tobytes()
    at = data.index(b"\xff\xc4") + 5
    return data[:at] + b"\xff" * 16 + data[at + 16 :]


def png_with_spoilt_pixels():
    data = bytearray(png(smooth_image(12)))
    at = data.index(b"IDAT") + 6
    data[at : at + 30] = bytes(value ^ 0x5A for value in data[at : at + 30])
    return bytes(data)


def webp_with_spoilt_pixels():
    """A lossless WebP whose codes are all ones."""
    data = bytearray(variants()["webp lossless"])
    at = data.index(b"VP8L") + 13
    data[at : at + 200] = b"\xff" * 200
    return bytes(data)


def broken():
    """What it is -> (bytes, or None for no key; the reason that must be named)."""
    formats = ("jpeg", "png", "gif", "webp", "bmp")
    cut = {f"{name} cut short": variants()[name] for name in formats}
    return {
        **{name: (data[: len(data) // 2], "truncated") for name, data in cut.items()},
        **{f"{name} without size": (with_size(name, 0, 0), "invalid") for name in ("PNG", "BMP", "JPEG")},
        **{f"{name} bomb": (with_size(name, 60_000, 60_000), "too large") for name in ("PNG", "JPEG", "GIF")},
        "BMP bomb": (with_size("BMP", 2**30, 2**30), "too large"),
        "WebP bomb": (huge_webp(), "too large"),
        "no key": (None, "empty"),
        "zero bytes": (b"", "empty"),
        "text": (b"this is a label, not an image", "not an image"),
        "a page": (
            b"<!doctype html><html><body>404 not found</body></html>",
            "not an image but an HTML page",
        ),
        "noise": (random.Random(0).randbytes(3000), "not an image"),
        "TIFF bomb": (tiff_with_width(2**31), "too large"),
        "TIFF cut short": (rare_variants()["tiff"][:700], "pixel data cannot be decoded"),
        "JPEG XL": (b"\xff\x0a" + bytes(9), "JPEG XL image which is not decoded: convert it to PNG or JPEG"),
        "jpeg, spoilt": (jpeg_with_spoilt_tables(), "pixel data cannot be decoded"),
        "png, spoilt": (png_with_spoilt_pixels(), "pixel data cannot be decoded"),
        "webp, spoilt": (webp_with_spoilt_pixels(), "pixel data cannot be decoded"),
    }


def unusual():
    """What it is -> bytes that training must use, odd as they are."""
    kinds = ("gray", "cmyk", "16 bit", "1 bit", "palette", "alpha", "animated", "rotated", "progressive")
    return {
        **{name: data for name, data in variants().items() if any(kind in name for kind in kinds)},
        "png gray 16 bit": by_opencv(".png", np.uint16, channels=1),
        "png alpha 16 bit": by_opencv(".png", np.uint16, channels=4),
        "bmp palette": by_pillow("P", "BMP"),
        **{name: rare_variants()[name] for name in ("tiff cmyk", "jp2", "pgm", "avif")},
        **{f"{name} of one pixel": of_one_pixel(name) for name in ("JPEG", "PNG", "WEBP", "BMP")},
        "GIF of one pixel": of_one_pixel("GIF", "P"),
        "gray JPEG of one pixel": of_one_pixel("JPEG", "L"),
    }


def layout():
    """Where the defects are: index -> name, of all records."""
    names = [*broken(), *unusual()]
    places = random.Random(1).sample(range(1, GOOD + len(names) - 1), len(names))  # neither first nor last
    return dict(zip(places, names, strict=True))


def reasons():
    """Index -> reason of every record that must be refused."""
    expected = broken()
    return {index: expected[name][1] for index, name in layout().items() if name in expected}


def torture_database(folder):
    """Write it; an LMDB without labels."""
    contents = {name: data for name, (data, _) in broken().items()} | unusual()
    places = layout()
    return database(
        folder, {index: contents[name] for index, name in places.items()}, count=GOOD + len(places)
    )
