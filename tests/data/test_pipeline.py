"""The view pipeline on real LMDBs and DALI: order, sharding, bit-equality, broken records, clean ends."""

import gc
import itertools
import logging
import random
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from crop_views import as_bytes, decoded, png, psnr
from encoded_images import by_opencv, by_pillow, mutations, patched, variants
from lmdb_folders import write_database
from reference_view import reference_plain

from lmim_fast.config import DataConfig, GuidanceConfig
from lmim_fast.data.background import Background
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.data.records import RecordStore
from lmim_fast.errors import DataError, UsageError

COUNT = 23


def smooth_image(number):
    rng = np.random.default_rng(number)
    size = tuple(int(side) for side in rng.integers(12, 160, 2))
    return cv2.resize(rng.integers(0, 256, (4, 9, 3), dtype=np.uint8), size, interpolation=cv2.INTER_CUBIC)


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


def database(folder, replaced=None, count=COUNT):
    """An LMDB of `count` smooth crops, PNG and JPEG by turns; `replaced` maps indices to other bytes."""
    replaced = replaced or {}
    images = {}
    for index in range(count):
        encoded = png(smooth_image(index))
        if index % 2:
            encoded = cv2.imencode(".jpg", smooth_image(index))[1].tobytes()
        images[b"image-%09d" % (index + 1)] = replaced.get(index, encoded)
    missing = [key for key, value in images.items() if value is None]
    extra = [(key, value) for key, value in images.items() if value is not None]
    return write_database(folder, count, labels=False, extra=extra, skip=missing)


def pipeline(folder, *, batch_size=8, loader=None, seed=3, **options):
    store = RecordStore([folder])
    options.setdefault("guidance", GuidanceConfig())
    options.setdefault("end_step", 4)
    loader = loader or DataConfig(threads=2)
    return ViewPipeline(store, SampleOrder(len(store), batch_size, seed), loader=loader, seed=seed, **options)


def samples(folder, **options):
    """Every sample of a run by (epoch, index): its plain, warped and finished views."""
    found = {}
    with pipeline(folder, **options) as batches:
        for batch in batches:
            views = batch.views()
            for row, key in enumerate(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)):
                found[key] = [batch.plain[row], batch.warped[row], views[0][row], views[1][row]]
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, views in found.items():
        assert all(torch.equal(a, b) for a, b in zip(views, expected[key], strict=True)), key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return database(tmp_path_factory.mktemp("lmdb"))


@pytest.fixture(scope="module")
def expected(folder):
    return samples(folder)


def test_batches_come_in_training_order_with_the_shares_of_the_order(folder):
    order = SampleOrder(COUNT, 12, 3)
    with pipeline(
        folder, batch_size=12, rank=1, world_size=2, accumulation=3, start_step=2, end_step=5
    ) as run:
        batches = list(run)
    assert [(batch.step, batch.micro) for batch in batches] == list(itertools.product((2, 3, 4), (0, 1, 2)))
    for batch in batches:
        epochs, indices = order.share(batch.step, 1, 2, batch.micro, 3)
        assert batch.epochs.tolist() == epochs.tolist()
        assert batch.indices.tolist() == indices.tolist()
        assert batch.plain.shape == batch.warped.shape == (2, 32, 128, 3)
        assert batch.plain.dtype == batch.warped.dtype == torch.uint8
        assert batch.wait_seconds >= 0
        plain, guidance = batch.views(torch.bfloat16)
        assert plain.shape == guidance.shape == (2, 3, 32, 128)
        assert plain.dtype == guidance.dtype == torch.bfloat16


def test_views_are_bit_equal_for_any_batch_size_prefetch_and_thread_count(folder, expected):
    assert len(expected) == 32
    loader = DataConfig(threads=1, prefetch=5)
    assert_same(samples(folder, batch_size=1, end_step=32, loader=loader), expected)
    assert_same(samples(folder, batch_size=16, end_step=2, loader=DataConfig(threads=3)), expected)


def test_views_are_bit_equal_for_any_world_size_and_accumulation(folder, expected):
    found = {}
    for rank in range(2):
        found |= samples(folder, rank=rank, world_size=2, accumulation=2)
    assert_same(found, expected)


def test_a_run_started_in_the_middle_continues_the_same_views(folder, expected):
    assert_same(
        samples(folder, end_step=2) | samples(folder, start_step=2, end_step=4),
        expected,
    )


def counted_permutations(monkeypatch, wait=lambda epoch: None):
    """The epochs whose permutation is computed, in that order; `wait` runs before each."""
    computed = []
    keys = SampleOrder._sort_keys

    def sort_keys(order, epoch):
        computed.append(epoch)
        wait(epoch)
        return keys(order, epoch)

    monkeypatch.setattr(SampleOrder, "_sort_keys", sort_keys)
    return computed


def test_a_run_started_in_a_later_epoch_computes_the_permutations_of_its_own_epochs_alone(
    folder, monkeypatch
):
    computed = counted_permutations(monkeypatch)
    with pipeline(folder, start_step=9, end_step=11) as batches:  # 8 of 23: places 72 to 87, epoch 3
        assert len(list(batches)) == 2
    assert computed == [3]


def test_the_next_permutation_is_computed_while_the_epoch_is_still_running(folder, monkeypatch):
    started, release = threading.Event(), threading.Event()

    def wait(epoch):
        if epoch == 1:
            started.set()
            assert release.wait(20)

    computed = counted_permutations(monkeypatch, wait)
    with pipeline(folder, batch_size=1, end_step=COUNT + 2) as batches:
        next(batches)
        assert started.wait(20)  # with 22 samples of epoch 0 to come
        for _ in range(COUNT - 1):
            assert next(batches).epochs.item() == 0
        release.set()
        assert [batch.epochs.item() for batch in batches] == [1, 1]
    assert computed == [0, 1]


@pytest.mark.parametrize("image_size", [(30, 90), (33, 127)], ids=str)
def test_views_of_any_size_can_be_made(folder, image_size):
    with pipeline(folder, image_size=image_size, end_step=2) as batches:
        for batch in batches:
            plain, guidance = batch.views()
            assert plain.shape == guidance.shape == (8, 3, *image_size)
            assert torch.isfinite(guidance).all()


def test_views_change_with_the_epoch_and_the_seed(folder, expected):
    first = {index: views for (epoch, index), views in expected.items() if epoch == 0}
    second = {index: views for (epoch, index), views in expected.items() if epoch == 1}
    assert len(second) == 9
    assert all(torch.equal(first[index][0], views[0]) for index, views in second.items())
    assert not any(torch.equal(first[index][3], views[3]) for index, views in second.items())
    other = samples(folder, seed=4)
    common = other.keys() & expected.keys()
    assert not any(torch.equal(other[key][3], expected[key][3]) for key in common)


def test_without_guidance_there_is_the_same_plain_view_alone(folder, expected):
    with pipeline(folder, guidance=None, end_step=1) as batches:
        (batch,) = batches
    plain, guidance = batch.views()
    assert batch.warped is None
    assert guidance is None
    for row, key in enumerate(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)):
        assert torch.equal(plain[row], expected[key][2])


def test_the_plain_view_is_the_released_bicubic_resize(real_crops):
    store = RecordStore([real_crops / "train" / "IIIT5K_train", real_crops / "test" / "SVT_647"])
    run = ViewPipeline(
        store, SampleOrder(len(store), 64, 0), guidance=None, loader=DataConfig(), seed=0, end_step=1
    )
    with run as batches:
        (batch,) = batches
    literal = [reference_plain(decoded(data)) for data in store.images(batch.indices.tolist())]
    result = psnr(as_bytes(batch.views()[0]), np.stack(literal))
    assert np.median(result) > 52.0, result
    assert result.min() > 42.0, result


def test_every_kind_of_image_file_gives_its_rgb_pixels(tmp_path):
    files = variants()
    folder = database(tmp_path / "lmdb", dict(enumerate(files.values())), count=len(files))
    with pipeline(folder, guidance=None, batch_size=len(files), end_step=1) as batches:
        (batch,) = batches
        assert batches.bad.count == 0, batches.bad.entries
    views = dict(zip(batch.indices.tolist(), as_bytes(batch.views()[0]), strict=True))
    compared = 0
    for index, (name, data) in enumerate(files.items()):
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is None:  # OpenCV reads a little less than DALI
            continue
        literal = reference_plain(np.ascontiguousarray(image[..., ::-1]))
        floor = (
            25.0 if name == "jpeg cmyk" else 30.0
        )  # noise is hard on two resizers, CMYK has two ways to RGB
        assert psnr(views[index][None], literal[None])[0] > floor, name
        compared += 1
    assert compared >= 20


BROKEN = {
    2: None,  # no key
    5: b"not an image",
    7: by_pillow("RGB", "JPEG")[:300],
    9: broken_jpeg(9),
    12: broken_png(12),
    16: by_opencv(".png")[:100],
}
TOLERANT = DataConfig(threads=2, max_bad_fraction=0.5)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return database(tmp_path_factory.mktemp("damaged") / "words", BROKEN)


def test_broken_records_leave_the_views_of_the_others_bit_equal(damaged, expected):
    found = samples(damaged, loader=TOLERANT)
    assert found.keys() == expected.keys()
    for key, views in found.items():
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
        pytest.raises(DataError, match=r"max_bad_fraction = 0\.25 .*image-0000000\d+: empty"),
    ):
        list(batches)


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
        patched("bmp gray", colours, b"\0\0\0\1"): "unsupported",
        patched("bmp 1 bit", colours, b"\xff\xff\xff\xff"): "unsupported",
    }


RUN_OF_64 = """
import sys
from lmim_fast.config import DataConfig
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.data.records import RecordStore
store = RecordStore([sys.argv[1]])
for seed in range(8):
    loader = DataConfig(threads=4, max_bad_fraction=1.0)
    order = SampleOrder(len(store), 64, seed)
    with ViewPipeline(store, order, guidance=None, loader=loader, seed=seed, end_step=2) as batches:
        assert [batch.plain.shape[0] for batch in batches] == [64, 64]
        reasons = {int(entry.key[-9:]) - 1: entry.reason for entry in batches.bad.entries}
print(sorted(reasons.items()))
"""


def test_large_batches_survive_images_that_fail_in_the_decoders_header_step(tmp_path):
    files = list(damaged_headers()) * 4
    folder = database(tmp_path / "lmdb", dict(enumerate(files)), count=64)
    run = subprocess.run(  # DALI's decoder would end the process
        [sys.executable, "-c", RUN_OF_64, str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
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


def own_threads():
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("lmim-")}


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_an_early_stop_leaves_no_thread_and_no_process(folder, taken):
    with pipeline(folder, end_step=1) as batches:  # libraries start threads at their first use and keep them
        list(batches)
    gc.collect()
    process = psutil.Process()
    before, children = process.num_threads(), process.children(recursive=True)  # of other tests
    with pipeline(folder, end_step=1000) as batches:
        for _ in range(taken):
            next(batches)
        assert own_threads()
    assert not own_threads()
    gc.collect()
    assert process.num_threads() <= before
    assert process.children(recursive=True) == children


def test_a_finished_run_ends_and_may_be_closed_twice(folder):
    batches = pipeline(folder, end_step=1)
    assert len(list(batches)) == 1
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()
    batches.close()
    assert not own_threads()


def test_an_exception_of_the_consumer_leaves_no_thread(folder):
    def consume():
        with pipeline(folder, end_step=1000) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert not own_threads()


def test_an_error_in_the_background_surfaces_in_next(folder, monkeypatch):
    def fail(store, indices):
        raise OSError("the disk is gone")

    with pipeline(folder, end_step=1000) as batches:
        next(batches)
        monkeypatch.setattr(RecordStore, "images", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            list(batches)
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)


def test_the_background_works_ahead_no_further_than_its_depth():
    taken, release = [], threading.Semaphore(0)

    def source():
        for number in range(100):
            taken.append(number)
            release.release()
            yield number

    ahead = Background(source(), 3, "lmim-test")
    assert next(ahead) == 0
    for _ in range(5):  # one consumed, three waiting, one in hand
        assert release.acquire(timeout=5)
    assert not release.acquire(timeout=0.2)
    assert taken == [0, 1, 2, 3, 4]
    ahead.close()
    with pytest.raises(StopIteration):
        next(ahead)
    assert not own_threads()


def test_a_gpu_loader_without_cuda_training_and_an_uneven_batch_are_refused(folder):
    with pytest.raises(UsageError, match="CUDA"):
        pipeline(folder, loader=DataConfig(device="gpu"))
    with pytest.raises(UsageError, match="multiple"):
        pipeline(folder, batch_size=9, world_size=2)
    assert not own_threads()


@pytest.mark.slow
def test_memory_and_open_files_stay_flat_over_many_batches(folder):
    process = psutil.Process()
    with pipeline(folder, batch_size=4, end_step=5000) as batches:
        for number, batch in enumerate(batches):
            batch.views()
            if number == 500:
                memory, files = process.memory_info().rss, process.num_fds()
    assert process.memory_info().rss - memory < 64 * 2**20
    assert process.num_fds() <= files
