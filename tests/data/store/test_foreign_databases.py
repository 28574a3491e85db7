"""Databases and trees that other people made: numbering, keys, single files, names, permissions, limits."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import lmdb
import pytest
from lmdb_folders import image, ordinary_user, write_database

from lmim_fast.data.store.databases import find_databases
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError
from lmim_fast.native import native


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


def _limited(paths, soft, hard, queue):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        queue.put(len(RecordStore(paths).gather(range(len(paths)), 2**20).encoded))
    except DataError as error:
        queue.put(str(error))


def test_more_databases_than_open_files_raise_the_limit_or_say_what_to_raise(tmp_path):
    for number in range(70):
        write_database(tmp_path / f"{number:02}", 1)
    context = multiprocessing.get_context("fork")
    answers = []
    for soft, hard in ((64, 4096), (64, 64)):
        queue = context.SimpleQueue()
        process = context.Process(target=_limited, args=(sorted(tmp_path.iterdir()), soft, hard, queue))
        process.start()
        answers.append(queue.get())
        process.join()
    assert answers[0] == 70
    needed = answers[1].split("need ")[1].split()[0]
    assert int(needed) > 140 + 64
    assert answers[1] == (
        f"the databases need {needed} open files, this process may have 64; give `ulimit -n {needed}` before"
        " the command, or join them with `lmim data merge`"
    )


def test_what_the_system_refuses_is_not_called_damaged(tmp_path, monkeypatch):
    folder = write_database(tmp_path / "crops", 2)
    for code, advice in (
        (errno.ENODEV, "its file system cannot map files into memory; copy the database to a local disk"),
        (
            errno.EMFILE,
            "this process has as many files open as it may; raise that, for example `ulimit -n",
        ),
        (
            errno.ENOMEM,
            "there are no addresses left to map it; raise the limit, for example `ulimit -v unlim",
        ),
    ):

        def refuse(file, *, code=code, **options):
            raise lmdb.Error(f"{file}: {os.strerror(code)}")

        monkeypatch.setattr(lmdb, "open", refuse)
        with pytest.raises(DataError) as error:
            RecordStore([folder])
        start = f"{folder}/data.mdb: cannot be read ({os.strerror(code)}); "
        assert str(error.value).startswith(start + advice)


@pytest.mark.skipif(native() is None, reason="lmim_fast._C is not built")
def test_the_native_reader_names_what_the_system_refused():
    unmapped = "/sys/devices/system/cpu/online"  # has a size, and no way to map it
    for path, code in ((unmapped, errno.ENODEV), ("/nowhere", errno.ENOENT)):
        with pytest.raises(OSError, match=os.strerror(code)) as error:
            native().LmdbFile(path, True)
        assert (error.value.errno, error.value.filename) == (code, path)


_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
void *mmap(void *at, size_t size, int protection, int flags, int file, off_t offset) {
    static void *(*real)(void *, size_t, int, int, int, off_t);
    if (!real) real = dlsym(RTLD_NEXT, "mmap");
    char link[64], name[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (file >= 0 && readlink(link, name, sizeof name - 1) > 0 && strstr(name, "unmappable")) {
        errno = ENODEV;
        return MAP_FAILED;
    }
    return real(at, size, protection, flags, file, offset);
}
"""
_FAILING_READS = """
#define _GNU_SOURCE
#include <errno.h>
#include <sys/uio.h>
ssize_t preadv64(int file, const struct iovec *to, int count, off_t offset) {
    errno = EIO;
    return -1;
}
ssize_t preadv(int file, const struct iovec *to, int count, off_t offset) {
    return preadv64(file, to, count, offset);
}
"""


def _preload(folder, source):
    """The environment of a process whose system calls are these."""
    (folder / "shim.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    subprocess.run(command, check=True)
    return {**os.environ, "LD_PRELOAD": str(folder / "shim.so")}


def test_a_file_system_without_maps_is_named(tmp_path):
    folder = write_database(tmp_path / "unmappable", 2)
    program = (
        "from pathlib import Path\n"
        "from lmim_fast.data.store.records import RecordStore\n"
        "from lmim_fast.data.store.writer import LmdbWriter\n"
        "from lmim_fast.errors import LmimError\n"
        f"folder = Path({str(folder)!r})\n"
        "for use in (lambda: RecordStore([folder]), LmdbWriter(folder / 'new', 3).__enter__):\n"
        "    try: use()\n"
        "    except LmimError as error: print(error)"
    )
    environment = _preload(tmp_path, _SHIM)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"{folder}/data.mdb: cannot be read (No such device); its file system cannot map files into memory;"
        " copy the database to a local disk\n"
        f"cannot write the LMDB {folder}/new: {folder}/new.partial/records.partial: No such device; its file"
        " system cannot map files into memory; write on a local disk, then copy it\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(native() is None, reason="lmim_fast._C is not built")
def test_a_read_that_the_disk_refuses_ends_with_the_systems_error(tmp_path):
    folder = write_database(tmp_path / "crops", 2)
    program = (
        "from lmim_fast.data.store.records import RecordStore\n"
        "from lmim_fast.errors import DataError\n"
        f"store = RecordStore([{str(folder)!r}])\n"
        "try: store.gather([1], 2**20)\n"
        "except DataError as error: print(error)"
    )
    environment = _preload(tmp_path, _FAILING_READS)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"{folder}: image-000000002: cannot be read (Input/output error); the disk fails; copy the data to"
        " another one\n"
    )
