"""Find LMDB folders in the field's layout, open each once per process, check `num-samples`.

Layout: `num-samples`, and 1-based `image-%09d` (encoded bytes) and `label-%09d` (UTF-8; all may be absent).
"""

from __future__ import annotations

import os
import stat
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmim_fast.errors import DataError

try:
    import lmdb
except ImportError as error:  # a machine may have torch and nothing else
    raise ImportError("reading records needs lmdb: pip install lmdb") from error

COUNT_KEY = b"num-samples"


def image_key(number: int) -> bytes:
    """Key of the image with this 1-based number."""
    return b"image-%09d" % number


def label_key(number: int) -> bytes:
    """Key of the label with this 1-based number."""
    return b"label-%09d" % number


@dataclass(frozen=True)
class Database:
    """One LMDB folder: its records have the indices first_index .. first_index + count - 1."""

    path: str
    count: int
    first_index: int
    has_labels: bool


def find_databases(paths: Sequence[str | Path]) -> list[str]:
    """Absolute paths of all LMDB folders at or under `paths`: in the order given, sorted within each.

    Raises:
        DataError: a path is missing, unreadable or holds no LMDB, or a database is found twice.
    """
    if not paths:
        raise DataError("no data path was given; name at least one LMDB folder")
    databases: dict[str, str] = {}  # real path -> path as reached
    for path in paths:
        folders = _folders_with_data(os.path.abspath(path))
        if not folders:
            raise DataError(
                f"{path}: no LMDB here; give a folder with a data.mdb in it or in its sub-folders"
            )
        for folder in folders:
            earlier = databases.setdefault(os.path.realpath(folder), folder)
            if earlier is not folder:
                same = "" if earlier == folder else f" (the same as {earlier})"
                raise DataError(f"{folder}: the database is given twice{same}; name each one once")
    return list(databases.values())


def _folders_with_data(root: str) -> list[str]:
    try:
        mode = os.stat(root).st_mode
    except OSError as error:
        raise DataError(f"{root}: cannot be opened ({error.strerror}); check the data path") from error
    if not stat.S_ISDIR(mode):
        raise DataError(f"{root}: not a folder; give the folder that holds data.mdb")

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: cannot be listed ({error.strerror}); check its permissions"
        ) from error

    folders: list[str] = []
    entered: set[str] = set()  # real paths, so that a link to a parent folder ends the descent
    for folder, children, files in os.walk(root, followlinks=True, onerror=refuse):
        entered.add(os.path.realpath(folder))
        children[:] = sorted(c for c in children if os.path.realpath(os.path.join(folder, c)) not in entered)
        if "data.mdb" in files:
            folders.append(folder)
    return sorted(folders)


# LMDB forbids opening one file twice in a process, and using an environment across a fork. Environments live
# as long as they are referenced; a forked child closes its copies, so that it can open its own.
_environments: weakref.WeakValueDictionary[str, lmdb.Environment] = weakref.WeakValueDictionary()
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
    """This process's read-only environment of an LMDB folder; it closes with its last reference.

    Args:
        readahead: False for random reads of data that does not fit in memory.
    Raises:
        DataError: unreadable, not an LMDB, cut short, or already open in this process by other code.
    """
    name = os.path.realpath(path)
    with _lock:
        environment = _environments.get(name)
        if environment is None:
            environment = _open(path, readahead)
            _environments[name] = environment
        return environment


def _open(path: str, readahead: bool) -> lmdb.Environment:
    file = os.path.join(path, "data.mdb")
    try:
        with open(file, "rb"):
            size = os.path.getsize(file)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); check that it is a readable file"
        ) from error
    if size == 0:
        raise DataError(f"{file}: the file is empty (0 bytes); copy or write the database again")
    try:
        environment = lmdb.open(path, readonly=True, lock=False, readahead=readahead, create=False)
    except lmdb.Error as error:
        if "already open" in str(error):
            raise DataError(
                f"{path}: other code of this process has it open; close that lmdb.Environment first"
            ) from error
        raise DataError(f"{file}: not a usable LMDB ({error}); copy or write the database again") from error
    # Reading a page behind the end of the file would kill the process (SIGBUS).
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < needed:
        environment.close()
        raise DataError(
            f"{file}: cut short, {size} bytes, its header needs {needed}; copy it again"
            " (if the original has this size too, `mdb_copy -c` rewrites it)"
        )
    return environment


def check_database(path: str, first_index: int) -> Database:
    """Open an LMDB folder and check `num-samples` against its keys, without reading all of them.

    A wrong `num-samples` is one whose last image is absent or has a successor. Holes in between are broken
    records when they are read; here they give a warning.

    Raises:
        DataError: see `open_environment`; or the database is empty, or its `num-samples` is absent, not a
            number or wrong.
    """
    environment = open_environment(path)
    try:
        entries = environment.stat()["entries"]
        if entries == 0:
            raise DataError(f"{path}: the database is empty; write records into it or leave it out")
        with environment.begin() as transaction:
            count = _count(transaction, path)
            has_labels = _has_label(transaction, count)
    except lmdb.Error as error:
        raise DataError(f"{path}: damaged ({error}); copy or write the database again") from error
    expected = 1 + count * (2 if has_labels else 1)
    if entries < expected:
        warnings.warn(
            f"{path}: {count} records need {expected} keys, there are {entries}; some lack image or label",
            stacklevel=2,
        )
    return Database(path, count, first_index, has_labels)


def _count(transaction: lmdb.Transaction, path: str) -> int:
    value = transaction.get(COUNT_KEY)
    if value is None:
        seen = [
            bytes(key) for key, _ in zip(transaction.cursor().iternext(values=False), range(3), strict=False)
        ]
        raise DataError(
            f"{path}: no key 'num-samples', its first keys are {seen}; records need the keys num-samples,"
            " image-000000001, label-000000001, ..."
        )
    text = bytes(value).strip()
    if not text.isdigit():
        raise DataError(
            f"{path}: num-samples is {value[:32]!r}, not a number; write the number of images there"
        )
    claimed, last = int(text), _last_image(transaction)
    if last == 0:
        raise DataError(
            f"{path}: num-samples says {claimed}, but there is no image; write records or leave it out"
        )
    if claimed != last:
        raise DataError(
            f"{path}: num-samples says {claimed}, but the last image is {image_key(last).decode()}"
            f" ({last} found); write {last} there, or write the database again"
        )
    return claimed


def _has_label(transaction: lmdb.Transaction, count: int) -> bool:
    """Whether any record has a label: their keys stand together, so that one look finds the first."""
    cursor = transaction.cursor()
    return bool(cursor.set_range(label_key(1))) and label_key(1) <= bytes(cursor.key()) <= label_key(count)


def _last_image(transaction: lmdb.Transaction) -> int:
    """Number of the last well-formed image key, 0 without one. Keys are sorted, so no scan is needed."""
    cursor = transaction.cursor()
    there = cursor.set_range(b"image-:") or cursor.last()  # ":" follows "9": behind every image number
    while there and (key := bytes(cursor.key())) >= b"image-":
        number = key.removeprefix(b"image-")
        if len(number) == 9 and number.isdigit():
            return int(number)
        there = cursor.prev()
    return 0
