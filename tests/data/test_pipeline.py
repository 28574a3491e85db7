"""The view pipeline on real LMDBs and DALI: order, sharding, bit-equality, clean ends."""

import ctypes
import gc
import itertools
import threading

import cv2
import numpy as np
import psutil
import pytest
import torch
from crop_views import as_bytes, decoded, psnr
from encoded_images import variants
from pipeline_runs import COUNT, assert_same, database, pipeline, samples
from reference_view import reference_plain
from shared_memory import segments

from lmim_fast.config import DataConfig
from lmim_fast.data.background import Background
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import UsageError


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


def test_r20_views_are_bit_equal_for_any_batch_size_prefetch_and_thread_count(folder, expected):
    assert len(expected) == 32
    loader = DataConfig(threads=1, prefetch=5)
    assert_same(samples(folder, batch_size=1, end_step=32, loader=loader), expected)
    assert_same(samples(folder, batch_size=16, end_step=2, loader=DataConfig(threads=3)), expected)


def test_r20_views_are_bit_equal_for_any_world_size_and_accumulation(folder, expected):
    actual = {}
    for rank in range(2):
        actual |= samples(folder, rank=rank, world_size=2, accumulation=2)
    assert_same(actual, expected)


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


def own_threads():
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("lmim-")}


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_r19_an_early_stop_leaves_no_thread_no_process_and_no_shared_memory(folder, taken):
    with pipeline(folder, end_step=1) as batches:  # libraries start threads at their first use and keep them
        list(batches)
    gc.collect()
    process = psutil.Process()
    before, children = process.num_threads(), process.children(recursive=True)  # of other tests
    shared = segments(process)
    with pipeline(folder, end_step=1000) as batches:
        for _ in range(taken):
            next(batches)
        assert own_threads()
    assert not own_threads()
    gc.collect()
    assert process.num_threads() <= before
    assert process.children(recursive=True) == children
    assert segments(process) <= shared


def test_a_finished_run_ends_and_may_be_closed_twice(folder):
    batches = pipeline(folder, end_step=1)
    assert len(list(batches)) == 1
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()
    batches.close()
    assert not own_threads()


def test_r19_an_exception_of_the_consumer_leaves_no_thread(folder):
    def consume():
        with pipeline(folder, end_step=1000) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert not own_threads()


def test_an_error_in_the_background_surfaces_in_next(folder, monkeypatch):
    def fail(store, *arguments):
        raise OSError("the disk is gone")

    with pipeline(folder, end_step=1000) as batches:
        next(batches)
        monkeypatch.setattr(RecordStore, "gather", fail)
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
        assert release.acquire(timeout=60)
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
def test_r18_memory_files_and_threads_stay_flat_over_5000_batches_of_both_views(folder):
    """Measured while the pipeline is open: what it holds on to counts. A leak of 2 kB a batch would show."""
    process = psutil.Process()

    def held():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back is no leak
        return process.memory_info().rss, process.num_fds(), process.num_threads()

    with pipeline(folder, batch_size=4, end_step=5001) as batches:
        for number, batch in enumerate(batches):
            assert all(torch.isfinite(view).all() for view in batch.views())
            del batch
            if number == 500:
                memory, files, threads = held()
            if number == 5000:
                later = held()
    assert later[0] - memory < 8 * 2**20, (memory, later)
    assert later[1:] <= (files, threads)
