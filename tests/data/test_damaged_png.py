"""R28: a record decodes to the same pixels every time, or is refused."""

import random
import struct
import zlib

import numpy as np
import pytest
import torch
from encoded_images import variants
from pipeline_runs import database, pipeline

from lmim_fast.config import DataConfig
from lmim_fast.data.dali import Stage, build_pipeline, feed
from lmim_fast.data.png import still_png
from lmim_fast.data.samples import UNDECODABLE
from lmim_fast.data.store.probe import Status, probe
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.tools.inspect import summarize
from lmim_fast.data.tools.verify import check_records

KINDS = [name for name in variants() if not name.startswith(("gif", "bmp"))]  # those become plain BMPs


def flipped(image, rng):
    data = bytearray(image)
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def with_short_pixels(image):
    """An animated PNG whose checksums are right but whose pixel data ends in the first rows."""
    at = image.index(b"IDAT") - 4
    length = int.from_bytes(image[at : at + 4], "big")
    body = b"IDAT" + zlib.compress(zlib.decompress(image[at + 8 : at + 8 + length])[:200])
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return image[:at] + chunk + image[at + 12 + length :]


def decode(image, left_over):
    """Pixels by DALI, with other bytes in the memory that it is given; None: refused."""
    freed = [np.full(13 * 37 * 3 * size, left_over, np.uint8) for size in (1, 1, 1, 2, 4)]
    del freed
    decoder = build_pipeline(Stage.DECODE, batch_size=1, threads=1, device_id=None, image_size=(1, 1))
    feed(decoder, Stage.DECODE, [image], None)
    try:
        return np.array(decoder.run()[0][0]).copy()
    except RuntimeError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_r28_a_flipped_bit_is_refused_or_decodes_to_the_same_pixels_every_time(kind):
    rng = random.Random(0)
    for _ in range(20):
        image = flipped(variants()[kind], rng)
        image = still_png(image) if probe([image]).status[0] == Status.OK else None
        first = None if image is None else decode(image, 0xAA)
        if first is not None:
            np.testing.assert_array_equal(decode(image, 0x55), first)


def test_r28_an_animated_png_shows_the_pixels_of_its_still_image():
    image = variants()["png animated"]
    still = still_png(image)
    assert b"acTL" not in still
    np.testing.assert_array_equal(decode(still, 0xAA), decode(variants()["png"], 0x55))


def test_r28_training_verify_and_inspect_refuse_damaged_animated_pngs_and_repeat_the_rest(tmp_path):
    animated, rng = variants()["png animated"], random.Random(0)
    damaged = [with_short_pixels(animated)]
    while len(damaged) < 12:
        image = flipped(animated, rng)
        if probe([image]).status[0] == Status.OK and b"acTL" in image:
            damaged.append(image)
    folder = database(tmp_path / "words", dict(enumerate([*damaged, animated])), count=32)
    runs = []
    for _ in range(2):
        loader = DataConfig(threads=1, max_bad_fraction=1.0)
        with pipeline(folder, guidance=None, batch_size=16, loader=loader, end_step=2) as batches:
            runs.append(torch.cat([batch.plain for batch in batches]))
            refused = {int(entry.key[-9:]) - 1: entry.reason for entry in batches.bad.entries}
        assert refused == dict.fromkeys(range(12), UNDECODABLE)
    assert torch.equal(*runs)
    store = RecordStore([folder])
    assert {bad.record: bad.reason for bad in check_records(store, threads=1).bad} == refused
    assert summarize(store, store.databases[0], 32).broken == 12
