"""Batches in one block of memory: two equal forms, and what they leave behind."""

import gc
import multiprocessing
import os
import pickle
import random
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from encoded_images import mutations, variants
from lmdb_folders import image, write_database
from other_threads import other_threads_run_during

from lmim_fast.config import LabelConfig
from lmim_fast.data.charset import Charset
from lmim_fast.data.labels import LabelledRecords, LabelTable
from lmim_fast.data.store import gather, records
from lmim_fast.data.store.gather import EncodedImages, gather_in_python
from lmim_fast.data.store.probe import Status
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError
from lmim_fast.native import native

_C = native()
if _C is None:
    pytest.skip("lmim_fast._C is not built", allow_module_level=True)
REAL_DATA = Path(__file__).parents[3] / "../shared/data/train"
MAX_PIXELS = 2**20
pytestmark = pytest.mark.filterwarnings("ignore:.*some lack image or label:UserWarning")


def assert_equal(ours, theirs):
    assert [row.tobytes() for row in ours.encoded] == [row.tobytes() for row in theirs.encoded]
    for name in ("stride", "offsets", "lengths"):
        np.testing.assert_array_equal(getattr(ours.encoded, name), getattr(theirs.encoded, name))
    for name in ("status", "heights", "widths"):
        first, second = getattr(ours, name), getattr(theirs, name)
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second, err_msg=name)


def by_lmdb(store):
    """The same records, read by py-lmdb."""
    copy = pickle.loads(pickle.dumps(store))
    with patch.object(records, "open_files", lambda *_: None):
        assert copy._opened() is None
    return copy


def both_forms(store, indices, workers=None):
    """What is gathered, after checking that the forms agree."""
    ours = store.gather(indices, MAX_PIXELS, workers)
    assert_equal(ours, gather_in_python(by_lmdb(store).images(list(indices)), MAX_PIXELS))
    return ours


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two databases with every format, damaged files, an empty value and absent keys."""
    folder = tmp_path_factory.mktemp("lmdb")
    files = [*variants().values(), *mutations(random.Random(3), 200), b""]
    for number, part in enumerate((files[::2], files[1::2])):
        extra = [(b"image-%09d" % (row + 1), data) for row, data in enumerate(part)]
        absent = [b"image-%09d" % row for row in (4, 9)]
        write_database(folder / str(number), len(part) + 1, extra=extra, skip=absent)
    return RecordStore([folder])


@pytest.mark.parametrize("threads", [None, 1, 4])
@pytest.mark.parametrize("rectangle_bytes", [2**25, 0])
def test_both_forms_agree_on_every_kind_of_record(store, threads, rectangle_bytes, monkeypatch):
    monkeypatch.setattr(gather, "RECTANGLE_BYTES", rectangle_bytes)
    workers = threads and _C.Workers(threads)
    found = both_forms(store, np.random.default_rng(0).permutation(len(store)), workers)
    assert set(found.status) == set(Status) - {Status.UNDECODABLE}
    assert (found.encoded.rectangle() is None) == (rectangle_bytes == 0)
    assert both_forms(store, [3, 3, 0]).status.tolist()[:2] == [Status.EMPTY] * 2
    assert len(both_forms(store, []).encoded) == 0
    assert both_forms(store, [3, 8]).encoded.rectangle() is None  # nothing at all


def test_one_long_image_does_not_make_a_batch_of_mostly_nothing(tmp_path):
    extra = [(b"image-000000002", bytes(2**20))]
    store = RecordStore([write_database(tmp_path / "crops", 100, extra=extra)])
    assert both_forms(store, range(30)).encoded.stride == 2**20
    packed = both_forms(store, range(100)).encoded
    assert packed.stride == 0
    assert len(packed.arena) < 2 * 2**20


def test_an_index_or_a_limit_out_of_range_is_refused(store):
    for index in (-1, len(store)):
        with pytest.raises(IndexError, match=f"{index} is outside 0 .. {len(store) - 1}"):
            store.gather([0, index], MAX_PIXELS)
    for limit in (0, 2**40 + 1):
        with pytest.raises(ValueError, match="max_pixels must be in"):
            store.gather([0], limit)


def test_records_with_labels_are_gathered_by_their_own_numbers(tmp_path):
    folder = write_database(tmp_path / "crops", 9, skip=[b"label-000000002", b"label-000000005"])
    store = RecordStore([folder])
    labelled = LabelledRecords(store, LabelTable(store, Charset("word 123456789"), LabelConfig(), 10))
    found = labelled.gather(np.array([1, 6]), MAX_PIXELS)
    assert [row.tobytes() for row in found.encoded] == [image(3), image(9)]


def test_a_damaged_page_is_a_data_error_that_names_database_and_key(tmp_path):
    folder = write_database(tmp_path / "crops", 500)
    content = bytearray((folder / "data.mdb").read_bytes())
    page = content.index(b"image-000000250") // 4096 * 4096  # the leaf page of this key
    store = RecordStore([folder])
    content[page : page + 4096] = b"\xff" * 4096
    (folder / "data.mdb").write_bytes(content)
    message = r"crops: image-000000250 cannot be read \(page \d+ is damaged\); copy or write"
    with pytest.raises(DataError, match=message):
        store.gather([249], MAX_PIXELS, _C.Workers(2))
    assert both_forms(store, [0, 499]).status.tolist() == [Status.NOT_AN_IMAGE] * 2  # elsewhere it works


def test_without_the_native_form_python_gives_the_same(store, monkeypatch):
    expected = store.gather(range(60), MAX_PIXELS)
    monkeypatch.setitem(sys.modules, "lmim_fast._C", None)  # makes the import fail
    native.cache_clear()
    copy = pickle.loads(pickle.dumps(store))
    try:
        with pytest.warns(UserWarning, match=r"lmim_fast._C is not built"):
            actual = copy.gather(range(60), MAX_PIXELS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            copy.gather([0], MAX_PIXELS)
    finally:
        native.cache_clear()
    assert_equal(actual, expected)


def test_labels_and_raw_records_of_both_forms_are_equal(tmp_path):
    rows = [
        (b"label-000000002", b""),
        (b"label-000000003", bytes(range(256)) * 50),
        (b"image-000000004", b""),
    ]
    folder = write_database(
        tmp_path / "crops", 300, extra=rows, skip=[b"label-000000009", b"image-000000010"]
    )
    store = RecordStore([folder])
    found = [store.label_bytes(range(300)), list(store.raw_records(0)), store.fingerprint()]
    assert (found[0][1:3], found[0][8], found[1][9][0]) == ([b"", rows[1][1]], None, None)
    other = by_lmdb(store)
    assert [other.label_bytes(range(300)), list(other.raw_records(0)), other.fingerprint()] == found
    assert len(store._environments) == 0 < len(other._environments)


def test_an_image_put_in_a_row_is_the_rows_from_then_on():
    encoded = gather_in_python([b"first", b"2", b"", b"fourth"], MAX_PIXELS).encoded
    assert encoded.stride == 6
    encoded.put(1, np.frombuffer(b"other", np.uint8))
    assert encoded.rectangle()[1, :5].tobytes() == b"other"
    encoded.put(2, np.frombuffer(b"a longer one", np.uint8))
    assert encoded.rectangle() is None
    assert [row.tobytes() for row in encoded] == [b"first", b"other", b"a longer one", b"fourth"]
    encoded.put(2, np.frombuffer(b"short", np.uint8))
    assert [row.tobytes() for row in encoded] == [b"first", b"other", b"short", b"fourth"]
    assert encoded.rectangle().shape == (4, 6)
    assert encoded.lengths.tolist() == [5, 5, 5, 6]


def test_an_array_outlives_the_block_it_was_part_of(store):
    row = 0
    expected = store.images([row])[0]
    part = store.gather([row], MAX_PIXELS).encoded[0]
    gc.collect()
    junk = [store.gather(range(50), MAX_PIXELS) for _ in range(20)]
    assert part.tobytes() == expected
    assert len(junk) == 20


def _gathered_elsewhere(store, queue):
    found = store.gather([0, len(store) - 1], MAX_PIXELS)
    queue.put([row.tobytes() for row in found.encoded])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_gathers_with_its_own_files(tmp_path, method):
    store = RecordStore([write_database(tmp_path / "a", 3), write_database(tmp_path / "b", 3)])
    both_forms(store, [0, 5], _C.Workers(2))  # the parent has both open
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_gathered_elsewhere, args=(store, queue))
    process.start()
    assert queue.get(timeout=60) == store.images([0, 5])
    process.join(60)
    assert process.exitcode == 0
    both_forms(store, [0, 5])


def test_threads_gather_the_same_records(store):
    expected = store.gather(range(len(store)), MAX_PIXELS)
    copy, workers = pickle.loads(pickle.dumps(store)), _C.Workers(2)
    barrier = threading.Barrier(8)

    def read(number):
        barrier.wait(30)  # all of them make the first read at once
        for _ in range(5):
            assert_equal(
                copy.gather(range(len(store)), MAX_PIXELS, workers if number % 2 else None), expected
            )
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(8)))


def _mapped(folder):
    return Path("/proc/self/maps").read_text().count(f"{folder}/data.mdb")


def test_close_unmaps_the_files_and_ends_no_read(tmp_path):
    folder = write_database(tmp_path / "crops", 2000)
    store = RecordStore([folder])
    store.gather([1], MAX_PIXELS)
    assert _mapped(folder) == 1
    expected = store.images([0, 1999])
    done = threading.Event()

    def close_again_and_again():
        while not done.is_set():
            store.close()

    thread = threading.Thread(target=close_again_and_again)
    thread.start()
    try:
        for _ in range(20):
            found = store.gather(range(2000), MAX_PIXELS)
            assert [found.encoded[row].tobytes() for row in (0, 1999)] == expected
    finally:
        done.set()
        thread.join()
    store.close()
    gc.collect()
    assert _mapped(folder) == 0


def test_memory_files_and_threads_stay_flat_over_many_batches(tmp_path):
    folder = write_database(tmp_path / "crops", 300)
    sizes, rng = [], np.random.default_rng(0)
    threads = threading.active_count(), len(os.listdir("/proc/self/task"))
    store, workers = RecordStore([folder]), _C.Workers(3)
    for batch in range(1500):
        store.gather(rng.integers(0, 300, 128), MAX_PIXELS, workers)
        if batch % 100 == 99:
            store.close()  # its files are opened again
        if batch in (550, 1450):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append((pages, len(os.listdir("/proc/self/fd")), _mapped(folder)))
    (before, *open_before), (after, *open_after) = sizes
    assert after - before < 1000, "pages of 4 KB"
    assert open_before == open_after
    store.close()
    del workers
    gc.collect()
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == threads


def test_gathering_lets_other_threads_run(tmp_path):
    endless = variants()["jpeg"][:-2] + b"\xff\x00" * 2**21
    extra = [(b"image-000000001", endless)]
    store = RecordStore([write_database(tmp_path / "crops", 3, extra=extra)])
    store.gather([0], MAX_PIXELS)
    assert set(store.gather([0] * 16, MAX_PIXELS).status) == {Status.TRUNCATED}
    assert other_threads_run_during(lambda: store.gather([0] * 16, MAX_PIXELS))


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the shared word crops are not here")
def test_real_crops_are_the_same_in_both_forms():
    store = RecordStore([REAL_DATA])
    rows = np.random.default_rng(0).permutation(len(store))[:4096]
    for part in rows.reshape(-1, 256):
        assert both_forms(store, part, _C.Workers(2)).encoded.stride > 0


def test_the_rectangle_is_a_view_of_the_block():
    block = np.arange(12, dtype=np.uint8)
    encoded = EncodedImages(block, 4, np.array([0, 4, 8]), np.array([2, 4, 1]))
    assert np.shares_memory(encoded.rectangle(), block)
    assert [row.tolist() for row in encoded] == [[0, 1], [4, 5, 6, 7], [8]]
