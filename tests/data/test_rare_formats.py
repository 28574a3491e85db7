"""TIFF, JPEG 2000, PPM and AVIF are decoded; what is not decoded is refused under the name of its format."""

import io
import random
import struct
import zlib

import cv2
import numpy as np
import pytest
from encoded_images import HEIGHT, WIDTH, by_opencv, by_pillow, rare_variants, variants
from PIL import Image
from pipeline_runs import database
from torture import tiff_with_width

from lmim_fast.data import decoding
from lmim_fast.data.importers.entries import Item
from lmim_fast.data.importers.prepare import Preparer
from lmim_fast.data.samples import UNDECODABLE, decodable, reason_of
from lmim_fast.data.store import rare_formats
from lmim_fast.data.store.gather import gather_in_python
from lmim_fast.data.store.probe import Status, probe
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.tools.inspect import summarize
from lmim_fast.data.tools.sheet import decoded_crops
from lmim_fast.data.tools.stats import count_records
from lmim_fast.data.tools.verify import check_records

MAX_PIXELS = 2**20


def accepted(images):
    """Pixels, or the reason why not, of each image as the pipeline takes it."""
    found = decodable(gather_in_python(images, MAX_PIXELS))
    outcome = []
    for image, encoded, status in zip(images, found.encoded, found.status, strict=True):
        good = status == Status.OK
        outcome.append(cv2.imdecode(encoded, cv2.IMREAD_COLOR) if good else reason_of(status, image))
    return outcome


def test_every_variant_shows_the_pixels_that_pillow_shows():
    images = rare_variants()
    for name, pixels in zip(images, accepted(list(images.values())), strict=True):
        found = probe([images[name]])
        assert [column.tolist() for column in found] == [[Status.OK], [HEIGHT], [WIDTH]], name
        assert pixels.shape == (HEIGHT, WIDTH, 3), name
        picture = Image.open(io.BytesIO(images[name]))
        if picture.mode.startswith("I"):  # 16 bits of gray
            expected = np.repeat((np.array(picture) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        else:
            expected = np.array(picture.convert("RGB"))
        difference = np.abs(pixels[..., ::-1].astype(int) - expected)
        assert difference.mean() < (6 if "avif" in name or "jpeg" in name else 1), name


def test_a_tiff_lies_as_its_orientation_says():
    turned = by_pillow("RGB", "TIFF", tiffinfo={274: 6})
    assert probe([turned]).height.tolist() == [WIDTH]
    assert accepted([turned])[0].shape == (WIDTH, HEIGHT, 3)


def bombs():
    """Files that claim 2^31 x 13 or more."""
    tiff = rare_variants()["tiff alpha"]
    tile = tiff.replace(struct.pack("<HHI", 278, 4, 1), struct.pack("<HHI", 322, 4, 1))
    assert tile != tiff
    at = tile.index(struct.pack("<HHI", 322, 4, 1)) + 8
    jp2, avif = rare_variants()["jp2"], rare_variants()["avif"]
    size, place = jp2.index(b"\xff\x4f\xff\x51") + 8, avif.index(b"ispe") + 8
    return {
        "tiff": tiff_with_width(2**32 - 1),
        "tile": tile[:at] + struct.pack("<I", 2**31) + tile[at + 4 :],
        "jp2": jp2[:size] + b"\x7f\xff\xff\xff" * 2 + jp2[size + 8 :],
        "j2k": jp2[size - 8 : size] + b"\x7f\xff\xff\xff" * 2 + jp2[size + 8 :],
        "avif": avif[:place] + b"\x7f\xff\xff\xff" * 2 + avif[place + 8 :],
        "ppm": b"P6 9999999999 9999999999 255\n",
        "pbm": b"P4\n# large\n2147483647 13\n",
    }


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_by_its_header(name, monkeypatch):
    monkeypatch.setattr("lmim_fast.data.samples.decode", None)
    assert accepted([bombs()[name]]) == ["too large"]


@pytest.mark.parametrize("image", [b"P5 0 13 255\n", tiff_with_width(0), b"\xff\x4f\xff\x51" + bytes(60)])
def test_a_size_of_zero_is_refused(image):
    assert accepted([image]) == ["invalid"]


def damaged(image, rng, count):
    for _ in range(count):
        data = bytearray(image)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield bytes(data)
        yield image[: rng.randrange(1, len(image))]


def test_r28_damage_decodes_to_the_same_pixels_every_time_or_is_refused_in_silence(capfd):
    rng = random.Random(0)
    images = [bad for image in rare_variants().values() for bad in damaged(image, rng, 15)]
    first = accepted(images)
    left_over = [np.full(HEIGHT * WIDTH * 3 * size, 0xAA, np.uint8) for size in (1, 1, 2, 2, 4)]
    del left_over
    refused = 0
    for once, again in zip(first, accepted(images), strict=True):
        np.testing.assert_array_equal(once, again)
        refused += isinstance(once, str)
    assert len(images) // 2 < refused < len(images)
    assert capfd.readouterr() == ("", "")


def test_pixels_of_another_size_than_the_headers_are_refused(monkeypatch):
    monkeypatch.setitem(rare_formats._PARSERS, "TIFF", lambda image, max_pixels: (1, 1))
    assert accepted([rare_variants()["tiff"]]) == [UNDECODABLE]


def by_name():
    """What is not decoded -> what its reason begins with."""
    pillow = {name: by_pillow("RGB", name) for name in ("ICO", "PDF", "DDS")}
    rest = "image which is not decoded"
    return {
        b"\xff\x0a" + bytes(50): f"JPEG XL {rest}",
        b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50): f"JPEG XL {rest}",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50): f"HEIC {rest}",
        b"8BPS\0\1" + bytes(50): f"PSD {rest}",
        **{data: f"{name} {rest}" for name, data in pillow.items()},
        b"v/1\1" + bytes(50): f"EXR {rest}",
        by_opencv(".hdr", np.float32): f"HDR {rest}",
        b"<?xml version='1.0'?>\n<svg xmlns='x'></svg>": f"SVG {rest}",
        by_pillow("F", "TIFF"): "TIFF image of a kind that is not decoded",
        by_pillow("L", "JPEG2000", no_jp2=True): "JPEG 2000 image of a kind that is not decoded",
        b"<!doctype html><html></html>": "not an image but an HTML page",
        b"\n<HTML><body>": "not an image but an HTML page",
        b"\x1f\x8b\x08" + zlib.compress(b"x"): "not an image but gzip-compressed data",
        by_pillow("RGB", "TGA"): "not an image",
        b"P6 is a label": "not an image",
        bytes(50): "not an image",
    }


def test_what_is_not_decoded_is_named_by_its_format_by_every_command(tmp_path):
    images = [*by_name(), rare_variants()["avif"], variants()["jpeg"]]
    reasons = accepted(images)[:-2]
    for reason, start in zip(reasons, by_name().values(), strict=True):
        assert reason == start if start.startswith("not") else reason.startswith(f"{start}: convert it to")
    store = RecordStore([database(tmp_path / "words", dict(enumerate(images)), count=len(images))])
    assert [bad.reason for bad in check_records(store, threads=1).bad] == reasons
    crops, problems = decoded_crops(store, range(len(images)))
    assert problems == [*reasons, "", ""]
    assert [crop is None for crop in crops] == [True] * len(reasons) + [False] * 2
    counted = count_records(store)
    assert counted.broken == {reason: reasons.count(reason) for reason in reasons}
    assert counted.formats["AVIF"] == 1
    assert counted.formats["JPEG XL"] == 2
    summary = summarize(store, store.databases[0])
    assert [example.reason for example in summary.broken_examples] == reasons[:5]
    assert summary.broken == len(reasons)


def test_an_import_takes_what_training_takes_and_names_the_rest():
    prepare = Preparer(turn_vertical=True, apply_exif=True, keep_broken=False)
    images = [*rare_variants().values(), *by_name()]
    outcomes = prepare([Item(str(row), lambda image=image: image, None) for row, image in enumerate(images)])
    taken = [outcome.records[0][0] for outcome in outcomes if outcome.records]
    assert taken == list(rare_variants().values())
    rejected = [outcome.rejects[0].reason for outcome in outcomes if outcome.rejects]
    assert rejected == accepted(list(by_name()))


def test_the_level_of_opencvs_log_is_as_before():
    before = cv2.utils.logging.getLogLevel()
    assert decoding.decode(np.frombuffer(rare_variants()["tiff"][:99], np.uint8)) is None
    assert cv2.utils.logging.getLogLevel() == before
