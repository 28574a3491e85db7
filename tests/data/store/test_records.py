"""RecordStore on real LMDBs: reading, processes, threads, the fingerprint."""

import itertools
import multiprocessing
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest
from lmdb_folders import image, write_database

from lmim_fast.data.store import records
from lmim_fast.data.store.records import Database, Record, RecordStore
from lmim_fast.errors import DataError
from lmim_fast.native import native

REAL_DATA = Path(__file__).parents[3] / "../shared/data/train"


def test_records_run_through_nested_folders_in_sorted_order_and_through_paths_as_given(tmp_path):
    write_database(tmp_path / "many/b/deep/er", 2)
    write_database(tmp_path / "many/a", 3, labels=False)
    write_database(tmp_path / "one", 4)
    store = RecordStore([tmp_path / "one", str(tmp_path / "many")])
    folders = [str(tmp_path / name) for name in ("one", "many/a", "many/b/deep/er")]
    assert store.databases == (
        Database(folders[0], 4, 0, True),
        Database(folders[1], 3, 4, False),
        Database(folders[2], 2, 7, True),
    )
    assert len(store) == 9
    assert store.record(0) == Record(0, image(1, "one"), "word 1", folders[0], "image-000000001")
    assert store.record(6) == Record(6, image(3, "a"), None, folders[1], "image-000000003")
    assert store.record(8) == Record(8, image(2, "er"), "word 2", folders[2], "image-000000002")
    assert store.locate(7) == (folders[2], "image-000000001")
    expected = [image(2, "er"), image(1, "one"), image(1, "a"), image(1, "one")]
    assert store.images([8, 0, 4, 0]) == expected
    assert store.images([]) == []


def test_an_index_outside_the_records_is_an_index_error(tmp_path):
    store = RecordStore([write_database(tmp_path / "crops", 3)])
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"{index} is outside 0 .. 2"):
            store.images([0, index])


def test_labels_that_are_not_utf8_are_read_with_replacement(tmp_path):
    extra = [(b"label-000000001", b"caf\xe9"), (b"label-000000002", "日本語".encode())]
    store = RecordStore([write_database(tmp_path / "crops", 2, extra=extra)])
    assert [store.label(0), store.label(1)] == ["caf\ufffd", "日本語"]


@pytest.fixture
def by_lmdb(monkeypatch):
    """Records are read without the native form."""
    monkeypatch.setattr(records, "open_files", lambda *_: None)


@pytest.mark.parametrize("reason", ["page \\d+", ".*CORRUPTED"])
def test_a_damaged_page_is_a_data_error_that_names_database_and_key(tmp_path, request, reason):
    if "CORRUPTED" in reason:
        request.getfixturevalue("by_lmdb")
    elif native() is None:
        pytest.skip("lmim_fast._C is not built")
    folder = write_database(tmp_path / "crops", 500)
    content = bytearray((folder / "data.mdb").read_bytes())
    page = content.index(b"image-000000250") // 4096 * 4096  # the leaf page of this key
    store = RecordStore([folder])
    content[page : page + 4096] = b"\xff" * 4096
    (folder / "data.mdb").write_bytes(content)
    with pytest.raises(DataError, match=rf"crops: image-000000250 cannot be read \({reason}"):
        store.images([249])


def _images_elsewhere(store, queue):
    inherited = list(store._environments)  # the parent's, after a fork
    images = store.images([0, len(store) - 1])
    queue.put((images, any(environment in inherited for environment in store._environments)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_r13_another_process_reads_with_its_own_handles(tmp_path, by_lmdb, method):
    store = RecordStore([write_database(tmp_path / "a", 3), write_database(tmp_path / "b", 3)])
    expected = store.images([0, 5])  # the parent has both open
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_images_elsewhere, args=(store, queue))
    with store._environments[
        0
    ].begin() as transaction:  # and a transaction at work, as a data thread may have
        process.start()
        images, uses_handles_of_the_parent = queue.get(timeout=60)
        assert images == expected
        assert not uses_handles_of_the_parent
        process.join(60)
        assert process.exitcode == 0
        assert transaction.get(b"num-samples") == b"3"
    assert store.images([0, 5]) == expected


def test_a_pickled_store_holds_paths_and_counts_only(tmp_path):
    store = RecordStore([write_database(tmp_path / "crops", 50)], max_pixels=1000)
    store.images(range(50))
    data = pickle.dumps(store)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert (copy.databases, copy.max_pixels, len(copy)) == (store.databases, 1000, 50)
    assert copy.record(49) == store.record(49)


def test_two_stores_share_a_database_and_the_last_close_frees_it(tmp_path, by_lmdb):
    folder = write_database(tmp_path / "crops", 2)
    first, second = RecordStore([folder]), RecordStore([folder])
    assert first.images([0]) == second.images([0])
    first.close()
    assert second.images([1]) == [image(2)]
    with pytest.raises(lmdb.Error, match="already open"):
        lmdb.open(str(folder), readonly=True, lock=False)
    second.close()
    others = lmdb.open(str(folder), readonly=True, lock=False)  # would fail if a store held it
    with pytest.raises(DataError, match="other code of this process has it open"):
        first.images([0])
    others.close()
    assert first.images([0]) == [image(1)]  # a closed store opens again


def test_threads_read_the_same_records(tmp_path):
    store = RecordStore([write_database(tmp_path / "crops", 200)])
    expected = [image(number) for number in range(1, 201)]
    barrier = threading.Barrier(8)

    def read(_):
        barrier.wait(30)  # all of them make the first read at once
        return all(store.images(range(200)) == expected for _ in range(5))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(8)))


def test_open_files_stay_flat_over_many_batches_and_stores(tmp_path):
    folder = write_database(tmp_path / "crops", 20)
    open_files = []
    for round_ in range(200):
        store = RecordStore([folder])
        for _ in range(10):
            store.images(range(20))
        if round_ in (20, 199):
            open_files.append(len(os.listdir("/proc/self/fd")))
    assert open_files[0] == open_files[1]


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path):
    folder = write_database(tmp_path / "here/crops", 100)
    fingerprint = RecordStore([folder]).fingerprint()
    shutil.copytree(folder, tmp_path / "there/crops")
    assert RecordStore([tmp_path / "there"]).fingerprint() == fingerprint
    assert fingerprint["count"] == 100
    (database,) = fingerprint["databases"]
    assert (database["name"], database["count"], database["has_labels"]) == ("crops", 100, True)
    assert str(tmp_path) not in str(fingerprint)
    changes = {
        "last image": dict(count=100, extra=[(b"image-000000100", b"other")]),
        "first label": dict(count=100, extra=[(b"label-000000001", b"other")]),
        "image moved into label": dict(
            count=100, extra=[(b"image-000000001", b""), (b"label-000000001", image(1) + b"word 1")]
        ),
        "one record more": dict(count=101),
        "no labels": dict(count=100, labels=False),
    }
    for number, (change, options) in enumerate(changes.items()):
        changed = write_database(tmp_path / f"changed{number}/crops", **options)
        (now,) = RecordStore([changed]).fingerprint()["databases"]
        assert now["hash"] != database["hash"], change
        assert (now["images"] == database["images"]) == (change in ("first label", "no labels")), change


def test_the_fingerprint_reads_at_most_64_records_of_a_database(tmp_path, monkeypatch):
    store = RecordStore([write_database(tmp_path / "big", 3000), write_database(tmp_path / "small", 5)])
    keys_read = {0: [], 1: []}
    read = store._read
    monkeypatch.setattr(
        store, "_read", lambda which, keys: keys_read[which].extend(keys) or read(which, keys)
    )
    store.fingerprint()
    assert [len(keys_read[0]), len(keys_read[1])] == [2 * 64, 2 * 5]
    numbers = [int(key[6:]) for key in keys_read[0][::2]]
    assert (numbers[0], numbers[-1]) == (1, 3000)
    assert {b - a for a, b in itertools.pairwise(numbers)} <= {47, 48}


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the shared word crops are not here")
def test_real_crops_open_with_their_known_counts_and_labels():
    store = RecordStore([REAL_DATA])
    counts = {os.path.basename(database.path): database.count for database in store.databases}
    assert counts == {"IC15_train": 4464, "IIIT5K_train": 1981, "SROIE_words": 26996, "SVT_train": 257}
    assert store.label(0) == "Genaxis Theatre"
    assert all(data[:2] == b"\xff\xd8" for data in store.images(range(0, len(store), 97)))
