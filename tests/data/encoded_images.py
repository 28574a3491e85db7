"""Encoded images for tests: every variant that data sets hold, and mutations of them."""

import functools
import io

import cv2
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 13, 37


def by_pillow(mode, format_, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(data, format_, **options)
    return data.getvalue()


def by_opencv(extension, dtype=np.uint8, channels=3, options=()):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, channels)).astype(dtype)
    return cv2.imencode(extension, pixels, options)[1].tobytes()


@functools.cache
def variants():
    """Intact files of 13 x 37 pixels, in the forms that data sets hold."""
    other = Image.new("RGB", (WIDTH, HEIGHT), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    return {
        "jpeg": by_pillow("RGB", "JPEG"),
        "jpeg progressive": by_pillow("RGB", "JPEG", progressive=True),
        "jpeg gray": by_pillow("L", "JPEG"),
        "jpeg cmyk": by_pillow("CMYK", "JPEG"),
        "jpeg rotated": by_pillow("RGB", "JPEG", exif=exif),
        "jpeg restarts": by_pillow("RGB", "JPEG", restart_marker_blocks=1),
        "png": by_pillow("RGB", "PNG"),
        "png 16 bit": by_opencv(".png", np.uint16),
        "png 1 bit": by_pillow("1", "PNG"),
        "png palette": by_pillow("P", "PNG"),
        "png alpha": by_pillow("RGBA", "PNG"),
        "png gray alpha": by_pillow("LA", "PNG"),
        "png animated": by_pillow("RGB", "PNG", save_all=True, append_images=[other]),
        "bmp": by_pillow("RGB", "BMP"),
        "bmp gray": by_pillow("L", "BMP"),
        "bmp 1 bit": by_pillow("1", "BMP"),
        "bmp alpha": by_pillow("RGBA", "BMP"),
        "bmp opencv": by_opencv(".bmp"),
        "gif": by_pillow("P", "GIF"),
        "gif animated": by_pillow("RGB", "GIF", save_all=True, append_images=[other]),
        "webp": by_pillow("RGB", "WEBP"),
        "webp lossless": by_pillow("RGB", "WEBP", lossless=True),
        "webp alpha": by_pillow("RGBA", "WEBP"),
        "webp extended": by_pillow("RGB", "WEBP", exif=exif),
        "webp animated": by_pillow("RGB", "WEBP", save_all=True, append_images=[other]),
    }


@functools.cache
def rare_variants():
    """Intact files of 13 x 37 pixels of formats that OpenCV decodes and DALI does not."""
    other = Image.new("RGB", (50, 60), "red")
    gray = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH), dtype=np.uint16)
    deep = {format_: io.BytesIO() for format_ in ("TIFF", "JPEG2000")}
    for format_, data in deep.items():
        Image.fromarray(gray).save(data, format_)
    numbers = " ".join(map(str, np.random.default_rng(0).integers(0, 256, 3 * HEIGHT * WIDTH))).encode()
    return {
        "tiff": by_pillow("RGB", "TIFF"),
        **{f"tiff {name}": by_pillow("RGB", "TIFF", compression=name) for name in ("tiff_lzw", "jpeg")},
        "tiff big": by_pillow("RGB", "TIFF", big_tiff=True),
        "tiff 1 bit": by_pillow("1", "TIFF", compression="group4"),
        "tiff palette": by_pillow("P", "TIFF"),
        "tiff alpha": by_pillow("RGBA", "TIFF"),
        "tiff cmyk": by_pillow("CMYK", "TIFF"),
        "tiff 16 bit": by_opencv(".tiff", np.uint16),
        "tiff gray 16 bit": deep["TIFF"].getvalue(),
        "tiff pages": by_pillow("RGB", "TIFF", save_all=True, append_images=[other]),
        "jp2": by_pillow("RGB", "JPEG2000"),
        "jp2 alpha": by_pillow("RGBA", "JPEG2000"),
        "jp2 gray 16 bit": deep["JPEG2000"].getvalue(),
        "j2k": by_pillow("RGB", "JPEG2000", no_jp2=True),
        "ppm": by_pillow("RGB", "PPM"),
        "ppm 16 bit": by_opencv(".ppm", np.uint16),
        "ppm text": b"P3\n# a comment\n%d %d\n255\n%s\n" % (WIDTH, HEIGHT, numbers),
        "pgm": by_pillow("L", "PPM"),
        "pbm": by_pillow("1", "PPM"),
        "avif": by_opencv(".avif"),
        "avif alpha": by_opencv(".avif", channels=4),
        "avif 10 bit": by_opencv(".avif", np.uint16, options=[cv2.IMWRITE_AVIF_DEPTH, 10]),
    }


def patched(name, at, value):
    """A variant with the bytes at `at` replaced."""
    data = bytearray(variants()[name])
    data[at : at + len(value)] = value
    return bytes(data)


def mutations(rng, count):
    """Intact files with bytes flipped, overwritten, cut out, doubled, or cut off."""
    originals = [*variants().values(), *rare_variants().values()]
    for _ in range(count):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 4)):
            at = min(int(rng.expovariate(1 / 30)), len(data) - 1)  # most of them in the header
            kind = rng.randrange(5)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at : at + 4] = rng.choice(
                    [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", rng.randbytes(4)]
                )
            elif kind == 2:
                del data[at : at + rng.randrange(1, 9)]
            elif kind == 3:
                data[at:at] = data[: rng.randrange(1, 40)]
            else:
                del data[rng.randrange(1, len(data) + 1) :]
            if not data:
                break
        yield bytes(data)
