"""What the system refuses of a database is named, and the data not called damaged."""

import errno
import multiprocessing
import os
import resource
import subprocess
import sys

import lmdb
import pytest
from lmdb_folders import write_database

from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError
from lmim_fast.native import native


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
