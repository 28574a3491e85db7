"""Databases and trees that other people made: numbering, keys, single files, names, permissions."""

import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import lmdb
import pytest
from lmdb_folders import image, ordinary_user, write_database

from lmim_fast.data.store.databases import find_databases
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError


def from_zero(path, count, claimed=None, subdir=True, skip=()):
    """A database whose records are counted from 0."""
    with (
        lmdb.open(str(path), map_size=1 << 24, subdir=subdir) as environment,
        environment.begin(write=True) as transaction,
    ):
        for number in range(count):
            transaction.put(b"image-%09d" % number, image(number))
            transaction.put(b"label-%09d" % number, b"word %d" % number)
        transaction.put(b"num-samples", b"%d" % (count if claimed is None else claimed))
        for key in skip:
            transaction.delete(key)
    return path


def with_keys(folder, *keys):
    return write_database(folder, 0, skip=[b"num-samples"], extra=[(key, b"x") for key in keys])


@pytest.fixture
def open_folder():
    """A folder that other users may enter: pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("skip", [[], [b"image-000000000"]])
def test_records_that_are_counted_from_zero_are_all_read_under_their_own_keys(tmp_path, skip):
    folders = [write_database(tmp_path / "a", 2), from_zero(tmp_path / "b", 3, skip=skip)]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        store = RecordStore(folders)
    assert len(store) == 5
    expected = [b"" if skip else image(0), image(1), image(2)]
    assert store.images([2, 3, 4]) == expected
    assert [row.tobytes() for row in store.gather([1, 2, 3, 4], 2**20).encoded] == [image(2, "a"), *expected]
    assert store.labels([1, 2, 4]) == ["word 2", "word 0", "word 2"]
    assert [store.locate(index)[1] for index in (1, 2, 4)] == [
        "image-000000002",
        "image-000000000",
        "image-000000002",
    ]
    assert store.indices_of(1, [0, 2, 3]) == [2, 4, None]
    assert store.indices_of(0, [0, 2, 3]) == [None, 1, None]
    assert [stored for stored, _ in store.raw_records(1)] == [expected[0] or None, *expected[1:]]
    before = store.fingerprint()["databases"][1]["hash"]
    store.close()
    with lmdb.open(str(folders[1])) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"label-000000000", b"changed")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert RecordStore(folders).fingerprint()["databases"][1]["hash"] != before


def test_a_changed_count_or_other_keys_are_refused_with_what_is_there_and_what_to_do(tmp_path):
    images = [b"image-%09d" % number for number in range(1, 40)]
    cases = {
        "zero": (
            lambda f: from_zero(f, 39, claimed=38),
            "num-samples says 38, but its images are image-000000000 .. image-000000038; write 39 there .",
        ),
        "holes": (
            lambda f: write_database(f, 39, claimed=20, skip=images[3:9]),
            "num-samples says 20, but the last image is image-000000039; write 39 there .",
        ),
        "digits": (
            lambda f: write_database(f, 39, claimed="9" * 5000),
            r"num-samples says 9{20}\.\.\. \(5000 bytes\), but the last image is image-000000039; write 39",
        ),
        "huge": (lambda f: write_database(f, 3, claimed=10**18), "num-samples says 10{18}, but the last"),
        "negative": (
            lambda f: write_database(f, 3, claimed=-3),
            r"num-samples is b'-3', not a number, the last image is image-000000003; write 3 there",
        ),
        "float": (lambda f: write_database(f, 3, claimed="1e3"), "num-samples is b'1e3', not a number"),
        "inside": (lambda f: write_database(f, 3, claimed="3 3"), "num-samples is b'3 3', not a number"),
        "nul": (lambda f: write_database(f, 3, claimed="\0" * 40), r"num-samples is b'\\x00.*40 bytes"),
        "none": (
            lambda f: write_database(f, 3, skip=[b"num-samples"]),
            "no key 'num-samples', the|its images are image-000000001 .. image-000000003; write 3 there",
        ),
        "six": (
            lambda f: with_keys(f, *(b"%s-%06d" % (kind, n) for kind in (b"image", b"label") for n in (1, 2))),  # noqa: E501
            "no key 'num-samples'; its keys are image-000001 .. image-000002, label-000001 .. label-000002;"
            " records need the keys num-samples, image-000000001, .* rename them .'Other keys'",
        ),
        "plain": (
            lambda f: write_database(f, 0, claimed=12, extra=[(b"image-%d" % n, b"x") for n in range(1, 13)]),
            "num-samples says 12, but there is no image; its keys are image-1 .. image-9, num-samples;",
        ),
        "names": (
            lambda f: with_keys(f, b"image_hr-000000001", b"image_lr-000000001", b"\x1b[31m", b"meta"),
            r"its keys are \\x1b\[31m, image_hr-000000001, image_lr-000000001, meta; records need",
        ),
        "many": (lambda f: with_keys(f, *(b"%c" % c for c in range(97, 110))), "keys are a, b, c, d, ...;"),
    }  # fmt: skip
    for name, (write, message) in cases.items():
        folder = write(tmp_path / name)
        with pytest.raises(DataError, match=message) as error:
            RecordStore([folder])
        assert str(error.value).startswith(f"{folder}: ")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
    for written in ("3 \n", " 3", "3\0\0"):
        folder = write_database(tmp_path / "padded", 3, claimed=written)
        assert len(RecordStore([folder])) == 3
        shutil.rmtree(folder)


def test_labels_without_images_refuse_nothing_in_a_tree_and_are_refused_by_name(tmp_path):
    write_database(tmp_path / "all/crops", 2)
    labels = write_database(tmp_path / "all/text", 2, skip=[b"image-000000001", b"image-000000002"])
    with pytest.warns(UserWarning, match="1 passed over: text: an LMDB of labels without images"):
        assert len(RecordStore([tmp_path / "all"])) == 2
    with pytest.raises(DataError, match=r"text: it holds labels \(label-000000001 .. label-000000002, num-s"):
        RecordStore([labels])


def test_a_single_file_is_read_by_its_name_and_in_a_tree(tmp_path):
    (tmp_path / "all").mkdir()
    for name in ("one.lmdb", "two.mdb", "other"):
        from_zero(tmp_path / "all" / name, 3, subdir=False)
    for path, count in ((tmp_path / "all/other", 3), (tmp_path / "all/one.lmdb", 3), (tmp_path / "all", 6)):
        store = RecordStore([path])
        assert len(store) == count
        assert [row.tobytes() for row in store.gather([0, 2], 2**20).encoded] == [image(0), image(2)]
    assert [os.path.basename(database.path) for database in store.databases] == ["one.lmdb", "two.mdb"]
    assert store.fingerprint()["databases"][0]["name"] == "one.lmdb"
    folder = write_database(tmp_path / "crops", 2)
    assert find_databases([folder / "data.mdb"]) == [str(folder)]
    shutil.copy(folder / "data.mdb", folder / "backup.mdb")
    with pytest.warns(UserWarning, match=r"passed over: backup.mdb: an LMDB file beside a data.mdb"):
        assert find_databases([folder]) == [str(folder)]
    (tmp_path / "all/access.mdb").write_bytes(b"\0\1\0\0Standard Jet DB")
    with pytest.warns(
        UserWarning, match=r"passed over: access.mdb: named like an LMDB file without being one"
    ):
        assert len(find_databases([tmp_path / "all"])) == 2
    with pytest.raises(DataError, match=r"lock.mdb: not a usable LMDB"):
        RecordStore([folder / "lock.mdb"])


def test_two_names_of_one_file_are_one_database(tmp_path):
    folder = write_database(tmp_path / "all/a", 2)
    (tmp_path / "all/b").mkdir()
    os.link(folder / "data.mdb", tmp_path / "all/b/data.mdb")
    (tmp_path / "all/c").symlink_to(folder)
    with pytest.warns(UserWarning, match="2 passed over: b, c: another name of a database"):
        assert len(RecordStore([tmp_path / "all"])) == 2
    message = r"b: the database is given twice \(it is the same file as .*a\); name each one once"
    with pytest.raises(DataError, match=message):
        RecordStore([folder, tmp_path / "all/b"])
    first, second = RecordStore([folder]), RecordStore([tmp_path / "all/b"])  # of one process, at once
    assert first.images([0]) == second.images([0])


def test_what_is_passed_over_in_a_tree_is_said_and_read_when_it_is_named(open_folder):
    write_database(open_folder / "crops", 2)
    hidden = [write_database(open_folder / name / "crops", 2) for name in (".Trash-1000", ".snapshot")]
    (open_folder / "._crops.mdb").write_bytes(b"macOS")
    closed = open_folder / "lost+found"
    closed.mkdir(mode=0)
    (open_folder / "train").symlink_to("/nowhere/at/all")
    (open_folder / "circle").symlink_to("circle")
    with ordinary_user(), pytest.warns(UserWarning, match="passed over") as said:
        assert find_databases([open_folder]) == [str(open_folder / "crops")]
    assert [str(note.message).removeprefix(f"{open_folder}: ") for note in said] == [
        "2 passed over: .Trash-1000, .snapshot: hidden (a name with a dot in front); give it as a path of its"
        " own to read it",
        "1 passed over: lost+found: not readable by this user; change its permissions if it holds data",
        "2 passed over: circle, train: a link that leads nowhere; mend it if it should lead to data",
    ]
    assert find_databases([hidden[0].parent]) == [str(hidden[0])]
    with (
        ordinary_user(),
        pytest.raises(DataError, match=r"lost\+found: cannot be listed \(Permission denied"),
    ):
        find_databases([closed])
    (open_folder / "mounted").mkdir()
    (open_folder / "mounted/data.mdb").symlink_to("/nowhere/data.mdb")
    with pytest.raises(DataError, match=r"mounted/data.mdb: a link to /nowhere/data.mdb, which is not there"):
        find_databases([open_folder])


def test_names_that_are_not_utf8_are_read(tmp_path):
    root = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(root)
    shutil.move(write_database(tmp_path / "crops", 2), Path(root) / "w\udcff")
    store = RecordStore([root])
    assert store.record(1).image == image(2)
    assert store.gather([1], 2**20).encoded[0].tobytes() == store.images([1])[0]
    assert json.loads(json.dumps(store.fingerprint()))["databases"][0]["name"] == "w\udcff"
