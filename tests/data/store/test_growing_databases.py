"""Databases that another process writes while they are read, and disks that fail meanwhile."""

import errno
import multiprocessing
import os
import random
import sys
import time

import lmdb
import pytest
from lmdb_folders import image, write_database

from lmim_fast.data.store import databases as module
from lmim_fast.data.store import records, snapshots
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError
from lmim_fast.native import native


def _append(folder, start, stop, map_size):
    with lmdb.open(str(folder), map_size=map_size, sync=False) as environment:
        for number in range(start, stop):
            with environment.begin(write=True) as transaction:
                transaction.put(b"image-%09d" % number, image(number, "crops") * 20)
                transaction.put(b"num-samples", b"%d" % number)


def test_a_run_goes_on_with_the_records_of_its_start_after_another_process_appended(tmp_path):
    folder = write_database(tmp_path / "crops", 30)  # its map is of 64 MB
    store = RecordStore([folder])
    expected = store.images(range(30))
    store.gather([0], 2**20)
    context = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")
    process = context.Process(target=_append, args=(folder, 31, 1_200, 1 << 28))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert os.path.getsize(folder / "data.mdb") > 1 << 26
    assert store.images(range(30)) == expected
    assert [row.tobytes() for row in store.gather(range(30), 2**20).encoded] == expected
    assert len(store) == 30
    store.close()
    with pytest.warns(UserWarning, match="some lack image or label"):
        assert len(RecordStore([folder])) == 1_199


def _append_for(folder, start, seconds):
    """Commits as fast as may be: more records, and values of other sizes for keys of another kind."""
    end, rng = time.monotonic() + seconds, random.Random(0)
    with lmdb.open(str(folder), map_size=1 << 32, sync=False) as environment:
        while time.monotonic() < end:
            with environment.begin(write=True) as transaction:
                for key, value in (("image", image(start, "crops")), ("label", b"word %d" % start)):
                    transaction.put(f"{key}-{start:09d}".encode(), value)
                transaction.put(b"num-samples", b"%d" % start)
                for _ in range(4):  # pages change their kind
                    transaction.put(b"z%d" % rng.randrange(200), bytes(rng.choice([10, 1500, 9000])))
            start += 1


@pytest.mark.skipif(native() is None, reason="lmim_fast._C is not built")
def test_what_is_read_while_another_process_commits_is_what_was_written(tmp_path):
    """Readers take no lock, so the writer uses pages again that they are reading."""
    folder = write_database(tmp_path / "crops", 30)
    store = RecordStore([folder])
    indices = list(range(30)) * 100
    images, labels = store.images(indices), store.labels(indices)
    process = multiprocessing.get_context("fork").Process(target=_append_for, args=(folder, 31, 1.0))
    process.start()
    passes = 0
    while process.is_alive():
        assert [row.tobytes() for row in store.gather(indices, 2**20).encoded] == images
        assert store.labels(indices) == labels
        passes += 1
    process.join()
    assert process.exitcode == 0
    with module.open_environment(str(folder)).begin() as transaction:
        assert (passes > 2, transaction.id() > 50) == (True, True)


def test_a_state_that_was_written_over_is_read_again_and_a_writer_that_never_stops_is_named(
    tmp_path, monkeypatch
):
    folder = write_database(tmp_path / "crops", 30)
    environment = module.open_environment(str(folder))
    context, seen = multiprocessing.get_context("fork"), []

    def read_slowly(transaction, commits):
        seen.append(transaction.id())
        process = context.Process(target=_append, args=(folder, 31, 31 + commits.pop(), 1 << 26))
        process.start()
        process.join()
        if commits:
            raise lmdb.CorruptedError("what an old page holds")
        return transaction.id()

    commits = [1, 3, 2]  # the last one first; one more leaves a state alone
    last = snapshots.in_one_snapshot(str(folder), environment, lambda t: read_slowly(t, commits))
    assert (seen, last) == ([1, 3, 6], 6)
    monkeypatch.setattr(snapshots, "_TRIES", 2)
    busy = "another process writes this database so fast that it could not be read; let the writer finish, or"
    with pytest.raises(DataError, match=f"crops: {busy} read a copy of the database"):
        snapshots.in_one_snapshot(str(folder), environment, lambda t: read_slowly(t, [2]))


@pytest.mark.skipif(native() is None, reason="lmim_fast._C is not built")
def test_a_disk_that_fails_in_the_middle_is_named_and_the_data_not_called_damaged(tmp_path, monkeypatch):
    folder = write_database(tmp_path / "crops", 3)
    store = RecordStore([folder])
    store.gather([0], 2**20)
    cases = {
        native().LmdbRefused(errno.EIO, 1): (
            "image-000000003: cannot be read (Input/output error); the disk fails; copy the data to another"
            " one"
        ),
        native().LmdbRefused(errno.ESTALE, 0): (
            "image-000000002: cannot be read (Stale file handle); its network file system lost it; mount that"
            " again and give the same command again"
        ),
        native().LmdbRefused(errno.ENOTCONN, 0): (
            "image-000000002: cannot be read (Transport endpoint is not connected); the program behind its"
            " mount has ended; mount it again and give the same command again"
        ),
        native().LmdbBusy("tried 100 times", 0): (
            "another process writes this database so fast that image-000000002 could not be read; let the"
            " writer finish, or read a copy of the database"
        ),
    }
    for error, message in cases.items():

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(native(), "gather", fail)
        with pytest.raises(DataError) as caught:
            store.gather([1, 2], 2**20)
        assert str(caught.value) == f"{folder}: {message}"


def test_a_database_that_outgrows_the_map_says_that_the_command_continues(tmp_path, monkeypatch):
    """py-lmdb has a map of one size; the native form makes another."""
    monkeypatch.setattr(module, "ROOM_IN_MAP", 0)
    monkeypatch.setattr(records, "open_files", lambda *_: None)
    folder = write_database(tmp_path / "crops", 3)
    store = RecordStore([folder])
    store.images([0])
    process = multiprocessing.get_context("fork").Process(target=_append, args=(folder, 4, 700, 1 << 28))
    process.start()
    process.join()
    with pytest.raises(DataError, match=r"crops: it has grown by more than .* give the same command again"):
        store.images([0])
