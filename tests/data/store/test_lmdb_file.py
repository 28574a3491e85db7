"""The native reader of LMDB files: what py-lmdb finds, and an error for every damage."""

import importlib
import os
import random
import struct

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmdb_folders import write_database

from lmim_fast.data.store import gather
from lmim_fast.data.store.databases import image_key
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError
from lmim_fast.native import native

if native() is None:
    pytest.skip("lmim_fast._C is not built", allow_module_level=True)
_C = importlib.import_module("lmim_fast._C")
PAGE = 4096


def values(folder, numbers, workers=None):
    """What the native form finds under the numbers, b"" where nothing is."""
    files = [_C.LmdbFile(f"{folder}/data.mdb", True)]
    zeros = np.zeros(len(numbers), np.int64)
    arena, _, offsets, lengths, *_ = _C.gather(files, zeros, numbers, 2**26, 0, workers)
    ends = offsets + lengths
    return [arena[start:end].tobytes() for start, end in zip(offsets, ends, strict=True)]


def by_py_lmdb(folder, numbers):
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return [transaction.get(image_key(number)) or b"" for number in numbers]


def write(folder, rounds, map_size=1 << 30):
    """A database by transactions: in each, keys with their values; None deletes."""
    with lmdb.open(str(folder), map_size=map_size, sync=False) as environment:
        for changes in rounds:
            with environment.begin(write=True) as transaction:
                for key, value in changes:
                    if value is None:
                        transaction.delete(key)
                    else:
                        transaction.put(key, value)


SIZES = st.one_of(
    st.integers(0, 40),
    st.integers(1900, 2100),  # around the largest value inside a leaf
    st.integers(4060, 4100),  # around one page of its own
    st.integers(0, 30_000),
)


@settings(max_examples=60)
@given(
    count=st.integers(1, 400),
    sizes=st.lists(SIZES, min_size=1, max_size=8),
    labels=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_random_databases_are_read_as_py_lmdb_reads_them(tmp_path_factory, count, sizes, labels, seed):
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("lmdb")
    rounds, keys = [], list(range(1, count + 1))
    for _ in range(rng.randint(1, 3)):  # the later ones overwrite, delete, and reuse pages
        changes = []
        for number in rng.sample(keys, rng.randint(1, count)):
            value = None if rng.random() < 0.1 else rng.randbytes(rng.choice(sizes))
            changes.append((image_key(number), value))
            if labels:
                changes.append((b"label-%09d" % number, rng.randbytes(rng.randint(0, 30))))
        rounds.append(changes)
    write(folder, rounds)
    numbers = [0, *keys, count + 1, 10**9 - 1, 10**9, 2**40, -1]
    rng.shuffle(numbers)
    found = values(folder, numbers)
    assert found == [
        value if number >= 0 else b""
        for number, value in zip(
            numbers, by_py_lmdb(folder, [max(number, 0) for number in numbers]), strict=True
        )
    ]


def test_a_tree_of_four_levels_is_read_by_several_threads(tmp_path):
    long = b"x" * 480  # few keys to a branch page
    keys = [(image_key(number), b"%d" % number) for number in range(1, 100_001)]
    others = [(b"a%06d" % number + long, b"") for number in range(20_000)]
    write(tmp_path, [keys, others])
    with lmdb.open(str(tmp_path), readonly=True, lock=False) as environment:
        assert environment.stat()["depth"] >= 4
    workers = _C.Workers(3)
    numbers = np.random.default_rng(0).permutation(100_000) + 1
    assert values(tmp_path, numbers, workers) == [b"%d" % number for number in numbers.tolist()]


def test_an_empty_database_holds_nothing(tmp_path):
    write(tmp_path, [[(image_key(1), b"x")], [(image_key(1), None)]])
    assert values(tmp_path, [1, 2]) == [b"", b""]


@pytest.mark.parametrize("flag", [0x02, 0x04, 0x08])  # reverse keys, several values of a key, integer keys
def test_another_order_of_keys_is_refused(tmp_path, flag):
    write_database(tmp_path, 3)
    rewrite(tmp_path, lambda data: [data.__setitem__(page + 92, flag) for page in (0, PAGE)])
    with pytest.raises(_C.LmdbUnsupported, match="an order of their own"):
        values(tmp_path, [1])


def rewrite(folder, change):
    file = folder / "data.mdb"
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (16, b"\0\0\0\0", "no LMDB header"),
        (10, b"\2\0", "no LMDB header"),
        (PAGE + 16, b"\0\0\0\0", "no LMDB header"),
        (40, struct.pack("<I", 3000), "pages of 3000 bytes"),
        (40, struct.pack("<I", 2**20), "pages of 1048576 bytes"),
        (PAGE + 40, struct.pack("<I", 512), "different page sizes"),
    ],
)
def test_a_damaged_header_is_named(tmp_path, at, value, message):
    write_database(tmp_path, 3)
    rewrite(tmp_path, lambda data: data.__setitem__(slice(at, at + len(value)), value))
    with pytest.raises(_C.LmdbDamaged, match=message):
        values(tmp_path, [1])


def test_another_format_version_is_left_to_py_lmdb_with_one_warning(tmp_path, monkeypatch):
    store = RecordStore([write_database(tmp_path / "crops", 3)])
    copy = write_database(tmp_path / "newer", 3)
    rewrite(copy, lambda data: data.__setitem__(20, 3))
    file = _C.LmdbFile

    monkeypatch.setattr(
        gather.native(), "LmdbFile", lambda path, readahead: file(f"{copy}/data.mdb", readahead)
    )
    with pytest.warns(UserWarning, match=r"py-lmdb reads the databases.*data format version 3, not 1"):
        first = store.gather([0, 2], 2**26)
    second = store.gather([0, 2], 2**26)  # a warning here would be an error
    assert [row.tobytes() for row in first.encoded] == store.images([0, 2])
    assert [row.tobytes() for row in second.encoded] == store.images([0, 2])


def test_a_file_that_is_cut_after_it_was_opened_is_an_error_and_no_signal(tmp_path):
    store = RecordStore([write_database(tmp_path / "crops", 300)])
    store.gather([0], 2**26)
    size = os.path.getsize(tmp_path / "crops/data.mdb")
    os.truncate(tmp_path / "crops/data.mdb", size // 2 // PAGE * PAGE)
    with pytest.raises(DataError, match=r"crops: .*its header needs more"):
        store.gather(range(300), 2**26)


def test_what_is_written_after_the_file_was_opened_is_found(tmp_path):
    folder = write_database(tmp_path / "crops", 3)
    store = RecordStore([folder])
    assert store.gather([2], 2**26).encoded[0].tobytes() == store.images([2])[0]
    files = store._files
    for number in range(20):
        write(folder, [[(image_key(3), b"%d" % number * 20_000)]])
        found = files.gather(np.array([0]), np.array([3]), 2**26, None)
        assert found.encoded[0].tobytes() == b"%d" % number * 20_000
        assert store.images([2]) == [b"%d" % number * 20_000]


def test_no_mutation_of_a_tree_does_more_than_an_error(tmp_path):
    folder = write_database(tmp_path / "crops", 400)
    original = (folder / "data.mdb").read_bytes()
    numbers, rng, outcomes = range(402), random.Random(0), set()
    expected = values(folder, numbers)
    pages = [
        page
        for page in range(0, len(original), PAGE)
        if struct.unpack_from("<H", original, page + 10)[0] & 0x0B  # branch, leaf, header
    ]
    for _ in range(400):
        data = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(pages) + int(min(rng.expovariate(1 / 60), PAGE - 8))
            data[at : at + 2] = rng.choice([b"\0\0", b"\xff\xff", rng.randbytes(2)])
        (folder / "data.mdb").write_bytes(data)
        try:
            outcomes.add("same" if values(folder, numbers) == expected else "other")
        except (_C.LmdbDamaged, _C.LmdbUnsupported):
            outcomes.add("error")
    assert {"same", "error"} <= outcomes
