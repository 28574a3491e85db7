"""Find LMDBs in the field's layout (`keys`), open each once per process, check `num-samples`."""

from __future__ import annotations

import errno
import os
import resource
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmim_fast.data.store.keys import (
    COUNT_KEY,
    first_number,
    has_label,
    has_only_labels,
    image_key,
    kinds_of_keys,
    label_key,
    last_image,
)
from lmim_fast.data.store.snapshots import in_one_snapshot, lmdb
from lmim_fast.data.store.tree import data_file, search
from lmim_fast.errors import DataError

__all__ = ["COUNT_KEY", "Database", "check_database", "find_databases", "image_key", "label_key", "lmdb"]

# A map may be longer than its file. With room behind the end, what a writer appends is seen without a new
# map, which could not be made while other threads read. It costs addresses, no memory.
ROOM_IN_MAP = 2**32

_FILES_OF_A_RUN = 256  # open beside databases: libraries, connections, checkpoints


@dataclass(frozen=True)
class Database:
    """One LMDB: its records have the indices first_index .. first_index + count - 1."""

    path: str
    """Of its folder, or of a single file."""
    count: int
    first_index: int
    has_labels: bool
    first_number: int = 1
    """Number in the key of its first record, 0 or 1."""

    @property
    def last_number(self) -> int:
        """Number in the key of its last record."""
        return self.first_number + self.count - 1


def find_databases(paths: Sequence[str | Path]) -> list[str]:
    """Absolute paths of all LMDBs at or under `paths`: in the order given, sorted within each.

    What is passed over in a tree (hidden or closed folders, links that lead nowhere, labels without images)
    is told by a warning; a path that is given itself is never passed over.

    Raises:
        DataError: a path is missing, unreadable or holds no LMDB, or a database is given twice.
    """
    if not paths:
        raise DataError("no data path was given; name at least one LMDB folder")
    databases: dict[tuple[int, int] | str, str] = {}  # identity of the file -> path as reached
    for path in paths:
        tree = search(os.path.abspath(path))
        here: set[tuple[int, int] | str] = set()
        for folder in tree.databases:
            identity = _identity(folder)
            if identity in here:
                tree.again.append(folder)
            elif (earlier := databases.get(identity)) is not None:
                same = "" if earlier == folder else f" (it is the same file as {earlier})"
                raise DataError(f"{folder}: the database is given twice{same}; name each one once")
            elif folder != tree.root and _holds_only_labels(folder):
                tree.only_labels.append(folder)
            else:
                here.add(identity)
                databases[identity] = folder
        notes = tree.notes()
        if not here:
            seen = "".join(f"; {note}" for note in notes)
            raise DataError(
                f"{path}: no LMDB here{seen}; give a folder with a data.mdb in it or in its sub-folders"
            )
        for note in notes:
            warnings.warn(f"{path}: {note}", stacklevel=1)  # one place, so that each is shown once
    return list(databases.values())


def _identity(path: str) -> tuple[int, int] | str:
    """Equal for all names of one file: links, hard links, a folder that is mounted twice."""
    try:
        status = os.stat(data_file(path))
    except OSError:  # opening it tells
        return path
    return status.st_dev, status.st_ino


def _holds_only_labels(path: str) -> bool:
    try:
        return in_one_snapshot(path, open_environment(path), has_only_labels)
    except DataError:  # opening it again tells
        return False


# LMDB forbids opening one file twice in a process, and using an environment across a fork. Environments live
# as long as they are referenced; a forked child closes its copies, so that it can open its own.
_environments: weakref.WeakValueDictionary[tuple[int, int] | str, lmdb.Environment] = (
    weakref.WeakValueDictionary()
)
_lock = threading.Lock()


def _forget_after_fork() -> None:
    global _lock
    for environment in list(_environments.values()):
        environment.close()
    _environments.clear()
    _lock = threading.Lock()


os.register_at_fork(
    before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=_forget_after_fork
)


def open_environment(path: str, *, readahead: bool = True) -> lmdb.Environment:
    """This process's read-only environment of an LMDB; it closes with its last reference.

    Args:
        readahead: False for random reads of data that does not fit in memory.
    Raises:
        DataError: unreadable, not an LMDB, cut short, or already open in this process by other code.
    """
    name = _identity(path)
    with _lock:
        environment = _environments.get(name)
        if environment is None:
            environment = _open(path, readahead)
            _environments[name] = environment
        return environment


def _open(path: str, readahead: bool) -> lmdb.Environment:
    file = data_file(path)
    try:
        with open(file, "rb"):
            size = os.path.getsize(file)
    except OSError as error:
        raise refusal(file, error) from error
    if size == 0:
        raise DataError(f"{file}: the file is empty (0 bytes); copy or write the database again")
    name = os.fsencode(file)  # it may not be UTF-8
    options = dict(subdir=False, readonly=True, lock=False, readahead=readahead, create=False)
    try:
        try:
            environment = lmdb.open(name, map_size=2 * size + ROOM_IN_MAP, **options)
        except lmdb.Error as error:
            if os.strerror(errno.ENOMEM) not in str(error):
                raise
            environment = lmdb.open(name, **options)  # addresses are limited (`ulimit -v`)
    except lmdb.Error as error:
        if "already open" in str(error):
            raise DataError(
                f"{path}: other code of this process has it open; close that lmdb.Environment first"
            ) from error
        for code in _REFUSALS:
            if os.strerror(code) in str(error):
                raise refusal(file, OSError(code, os.strerror(code))) from error
        raise DataError(f"{file}: not a usable LMDB ({error}); copy or write the database again") from error
    # Reading a page behind the end of the file would kill the process (SIGBUS).
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < needed:
        size = os.path.getsize(file)  # it may have grown in between
    if size < needed:
        environment.close()
        raise DataError(
            f"{file}: cut short, {size} bytes, its header needs {needed}; copy it again"
            " (if the original has this size too, `mdb_copy -c` rewrites it)"
        )
    return environment


_REFUSALS = {
    errno.ENODEV: "its file system cannot map files into memory; copy the database to a local disk",
    errno.EMFILE: "this process has as many files open as it may; raise that, for example `ulimit -n 65536`",
    errno.ENFILE: "this machine has as many files open as it may; close other programs, or raise fs.file-max",
    errno.EIO: "the disk fails; copy the data to another one",
    errno.ESTALE: "its network file system lost it; mount that again and give the same command again",
    errno.ENOTCONN: "the program behind its mount has ended; mount it again and give the same command again",
    errno.ENOMEM: "there are no addresses left to map it; raise the limit, for example `ulimit -v unlimited`",
}


def refusal(file: str, error: OSError) -> DataError:
    """What the system said when a file was opened, mapped or read, and what to do: it is not damaged."""
    advice = _REFUSALS.get(error.errno or 0, "check that it is a readable file")
    return DataError(f"{file}: cannot be read ({error.strerror}); {advice}")


def allow_open_files(count: int) -> None:
    """Let this process open `count` files more: its limit is raised as far as a user may.

    Raises:
        DataError: that is not far enough; names the number.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + count
    if soft == resource.RLIM_INFINITY or needed + _FILES_OF_A_RUN <= soft:
        return
    if hard == resource.RLIM_INFINITY or hard > soft:
        wanted = max(soft, needed + _FILES_OF_A_RUN)
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if needed > soft:
        raise DataError(
            f"the databases need {needed + _FILES_OF_A_RUN} open files, this process may have {soft}; give"
            f" `ulimit -n {needed + _FILES_OF_A_RUN}` before the command, or join them with `lmim data merge`"
        )


def check_database(path: str, first_index: int) -> Database:
    """Open an LMDB and check `num-samples` against its keys, without reading all of them.

    A wrong `num-samples` is one whose last image is absent or has a successor. Holes in between are broken
    records when they are read; here they give a warning.

    Raises:
        DataError: see `open_environment`; or the database is empty, has other keys than the field's, or its
            `num-samples` is absent, not a number or wrong.
    """
    environment = open_environment(path)

    def look(transaction: lmdb.Transaction) -> tuple[int, int, int, bool]:
        entries = environment.stat()["entries"]
        if entries == 0:
            raise DataError(f"{path}: the database is empty; write records into it or leave it out")
        first = first_number(transaction)
        count = _count(transaction, path, first)
        return entries, first, count, has_label(transaction, first, count)

    entries, first, count, has_labels = in_one_snapshot(path, environment, look)
    expected = 1 + count * (2 if has_labels else 1)
    if entries < expected:
        warnings.warn(
            f"{path}: {count} records need {expected} keys, there are {entries}; some lack image or label",
            stacklevel=2,
        )
    return Database(path, count, first_index, has_labels, first)


_HOW = "'Other keys' in docs/DATA.md says how"
_WANTED = "records need the keys num-samples, image-000000001, label-000000001, ... (nine digits)"


def _count(transaction: lmdb.Transaction, path: str, first: int) -> int:
    value, last = transaction.get(COUNT_KEY), last_image(transaction)
    if last is None:
        if has_only_labels(transaction):
            raise DataError(
                f"{path}: it holds labels ({kinds_of_keys(transaction)}) and no images; leave it out, or"
                " write images and labels into one database"
            )
        says = (
            "no key 'num-samples'"
            if value is None
            else f"num-samples says {_text(value)}, but there is no image"
        )
        raise DataError(
            f"{path}: {says}; its keys are {kinds_of_keys(transaction)}; {_WANTED}: rename them ({_HOW})"
            " or leave the database out"
        )
    right = last - first + 1
    if first == 0 or value is None:
        images = f"its images are {image_key(first).decode()} .. {image_key(last).decode()}"
    else:
        images = f"the last image is {image_key(last).decode()}"
    if value is None:
        raise DataError(f"{path}: no key 'num-samples', {images}; write {right} there ({_HOW})")
    text = bytes(value).strip(b" \t\r\n\0")
    if not text.isdigit():
        raise DataError(
            f"{path}: num-samples is {_text(value)}, not a number, {images}; write {right} there ({_HOW})"
        )
    if len(text) > 18 or int(text) != right:
        raise DataError(
            f"{path}: num-samples says {_text(text)}, but {images}; write {right} there ({_HOW}), or write"
            " the database again"
        )
    return right


def _text(value: bytes | memoryview) -> str:
    """A value of `num-samples` for people."""
    text = bytes(value)
    shown = text.decode() if text.isdigit() else repr(text)
    return shown if len(text) <= 32 else f"{shown[:20]}... ({len(text)} bytes)"
