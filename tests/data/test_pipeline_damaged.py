"""Broken, mutated and odd image files: counted, named, replaced, and never a crash."""

import itertools
import logging
import random

import cv2
import numpy as np
import pytest
import torch
import warm
from crop_views import png
from encoded_images import by_opencv, by_pillow, mutations, patched, variants
from pipeline_runs import COUNT, assert_same, database, pipeline, samples, smooth_image

from lmim_fast.config import AugmentConfig, DataConfig
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError


def broken_jpeg(number):
    """A JPEG with an impossible Huffman table."""
    data = cv2.imencode(".jpg", smooth_image(number))[1].tobytes()
    at = data.index(b"\xff\xc4") + 5
    return data[:at] + b"\xff" * 16 + data[at + 16 :]


def broken_png(number):
    """A PNG with flipped bytes in its pixel data."""
    data = bytearray(png(smooth_image(number)))
    at = data.index(b"IDAT") + 6
    data[at : at + 30] = bytes(value ^ 0x5A for value in data[at : at + 30])
    return bytes(data)


BROKEN = {
    2: None,  # no key
    5: b"not an image",
    7: by_pillow("RGB", "JPEG")[:300],
    9: broken_jpeg(9),
    12: broken_png(12),
    16: by_opencv(".png")[:100],
}
pytestmark = pytest.mark.filterwarnings("ignore:.*some lack image or label:UserWarning")
TOLERANT = DataConfig(threads=2, max_bad_fraction=0.5)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return database(tmp_path_factory.mktemp("damaged") / "words", BROKEN)


@pytest.mark.parametrize("kind", ["abinet", "parseq"])
def test_broken_records_leave_the_augmented_views_of_the_others_bit_equal(damaged, folder, kind):
    runs = []
    for words in (folder, damaged):
        with pipeline(words, guidance=None, augment=AugmentConfig(kind=kind), loader=TOLERANT) as batches:
            runs.append([(batch.indices.tolist(), batch.plain) for batch in batches])
    whole, part = runs
    for (indices, views), (same, others) in zip(whole, part, strict=True):
        assert indices == same
        for row, index in enumerate(indices):
            assert torch.equal(views[row], others[row]) == (index not in BROKEN)


def test_broken_records_leave_the_views_of_the_others_bit_equal(damaged, expected):
    actual = samples(damaged, loader=TOLERANT)
    assert actual.keys() == expected.keys()
    for key, views in actual.items():
        if key[1] not in BROKEN:
            assert all(torch.equal(a, b) for a, b in zip(views, expected[key], strict=True)), key


def test_substitutes_are_the_orders_and_the_same_for_any_sharding(damaged, folder):
    whole = samples(damaged, loader=TOLERANT)
    parts = {}
    for rank in range(2):
        parts |= samples(damaged, loader=TOLERANT, rank=rank, world_size=2, accumulation=2)
    assert_same(parts, whole)
    assert_same(samples(damaged, loader=TOLERANT, batch_size=1, end_step=32), whole)
    order = SampleOrder(COUNT, 8, 3)
    intact = {index: views for (_, index), views in samples(folder, end_step=3).items()}
    for (epoch, index), views in whole.items():
        if index in BROKEN:
            candidates = (order.substitute(epoch, index, attempt) for attempt in itertools.count())
            chosen = next(candidate for candidate in candidates if candidate not in BROKEN)
            assert torch.equal(views[0], intact[chosen][0]), (epoch, index)


def test_broken_records_are_counted_and_named_once(damaged, caplog):
    with (
        caplog.at_level(logging.WARNING, "lmim_fast"),
        pipeline(damaged, loader=TOLERANT, end_step=9) as batches,
    ):
        for _ in batches:
            pass
        bad = batches.bad
    assert bad.count == len(BROKEN)
    assert bad.seen == 72
    assert {entry.key for entry in bad.entries} == {f"image-{index + 1:09d}" for index in BROKEN}
    assert all(entry.database == str(damaged) for entry in bad.entries)
    reasons = {int(entry.key[-9:]) - 1: entry.reason for entry in bad.entries}
    assert reasons[2] == "empty"
    assert reasons[5] == "not an image"
    assert reasons[7] == reasons[16] == "truncated"
    assert reasons[9] == reasons[12] == "pixel data cannot be decoded"
    logged = [record.getMessage() for record in caplog.records if "broken record" in record.getMessage()]
    assert len(logged) == len(BROKEN)
    assert all(sum(entry.key in message for message in logged) == 1 for entry in bad.entries)


def test_too_many_broken_records_stop_the_run_with_a_named_error(tmp_path):
    folder = database(tmp_path / "lmdb", dict.fromkeys(range(0, 40, 2), b""), count=40)
    with (
        pipeline(folder, loader=DataConfig(max_bad_fraction=0.25), end_step=100) as batches,
        pytest.raises(DataError, match=r"max-bad-fraction 0\.25 .*image-0000000\d+: empty"),
    ):
        list(batches)


def test_r27_broken_substitutes_do_not_make_the_share_larger_than_it_is(tmp_path):
    """Of records that are read in place of broken ones as many are broken: they count among the read ones."""
    broken = np.random.default_rng(0).permutation(600)[:240]  # 40 %; each met one costs 1.67 reads
    folder = database(tmp_path / "lmdb", dict.fromkeys(broken.tolist(), b""), count=600)
    loader = DataConfig(threads=1, max_bad_fraction=0.5)
    with pipeline(folder, guidance=None, batch_size=50, loader=loader, end_step=12) as batches:
        assert len(list(batches)) == 12
        assert batches.bad.count == 240


def test_r27_a_share_of_one_does_not_stop_a_run_with_nine_of_ten_records_broken(tmp_path):
    folder = database(tmp_path / "lmdb", dict.fromkeys(range(180), b""), count=200)
    loader = DataConfig(threads=1, max_bad_fraction=1.0)
    with pipeline(folder, guidance=None, batch_size=50, loader=loader, end_step=4) as batches:
        assert len(list(batches)) == 4
        assert batches.bad.count == 180


def test_a_store_without_a_readable_record_stops_the_run(tmp_path):
    folder = database(tmp_path / "lmdb", dict.fromkeys(range(3), b"x"), count=3)
    with (
        pipeline(folder, loader=DataConfig(max_bad_fraction=1.0)) as batches,
        pytest.raises(DataError, match="no readable record"),
    ):
        next(batches)


def test_mutated_files_never_stop_a_run_that_tolerates_them(tmp_path):
    files = list(mutations(random.Random(0), 200))
    folder = database(tmp_path / "lmdb", dict(enumerate(files)), count=len(files) + 20)
    loader = DataConfig(threads=2, max_bad_fraction=1.0, max_pixels=2**20)
    with pipeline(folder, batch_size=20, end_step=11, loader=loader) as batches:
        for batch in batches:
            assert torch.isfinite(batch.views()[1]).all()
        assert 20 < batches.bad.count < 200
        assert len(batches.bad.entries) == batches.bad.count


def damaged_headers():
    """Files whose damage DALI's decoder finds while it reads headers, with what becomes of them."""
    jpeg = variants()["jpeg"]
    tables, colours = jpeg.index(b"\xff\xdb"), 46  # the latter: place of a BMP's number of palette entries
    return {
        jpeg[:2] + b"junk" + jpeg[2:]: "invalid",
        jpeg[:tables] + b"\0" + jpeg[tables:]: "invalid",
        jpeg[:tables] + b"\xff\xd0" + jpeg[tables:]: "invalid",
        patched("webp animated", 20, b"\x0a"): "invalid",
        patched("bmp gray", colours, b"\0\0\0\1"): "pixel data cannot be decoded",
        patched("bmp 1 bit", colours, b"\xff\xff\xff\xff"): "pixel data cannot be decoded",
    }


def _run_of_64(folder):
    store = RecordStore([folder])
    for seed in range(8):
        loader = DataConfig(threads=4, max_bad_fraction=1.0)
        order = SampleOrder(len(store), 64, seed)
        with ViewPipeline(store, order, guidance=None, loader=loader, seed=seed, end_step=2) as batches:
            assert [batch.plain.shape[0] for batch in batches] == [64, 64]
            reasons = {int(entry.key[-9:]) - 1: entry.reason for entry in batches.bad.entries}
    print(sorted(reasons.items()))


def test_large_batches_survive_images_that_fail_in_the_decoders_header_step(tmp_path):
    files = list(damaged_headers()) * 4
    folder = database(tmp_path / "lmdb", dict(enumerate(files)), count=64)
    run = warm.Program(_run_of_64, folder).wait()  # DALI's decoder would end the process
    assert run.returncode == 0, run.stderr[-2000:]
    reasons = list(damaged_headers().values()) * 4
    assert run.stdout.strip() == str(list(enumerate(reasons)))


def test_images_of_one_pixel_and_of_one_row_work(tmp_path):
    tiny = {0: png(np.full((1, 1, 3), 200, np.uint8)), 1: png(np.full((1, 300, 3), 90, np.uint8))}
    tiny |= {2: png(np.full((200, 1, 3), 30, np.uint8))}
    folder = database(tmp_path / "lmdb", tiny, count=3)
    with pipeline(folder, batch_size=3, end_step=8) as batches:
        for batch in batches:
            order = np.argsort(batch.indices.numpy())
            assert batch.plain[order].float().mean(dim=(1, 2, 3)).tolist() == [200.0, 90.0, 30.0]
            assert torch.isfinite(batch.views()[1]).all()
        assert batches.bad.count == 0
