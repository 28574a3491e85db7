"""Records of one or more LMDBs as one sequence: index in, encoded image and label out."""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmim_fast.config import MAX_PIXELS
from lmim_fast.data.store.databases import (
    Database,
    allow_open_files,
    check_database,
    find_databases,
    image_key,
    label_key,
    lmdb,
    open_environment,
)
from lmim_fast.data.store.gather import DatabaseFiles, Gathered, gather_in_python, open_files
from lmim_fast.data.store.probe import check_max_pixels
from lmim_fast.data.store.snapshots import read_values
from lmim_fast.data.store.tree import data_file

__all__ = ["Database", "Record", "RecordStore", "Records"]

_TOGETHER = 64  # raw records in memory
_FINGERPRINT_RECORDS = 64  # per database: bounded, so that ten million records cost what a hundred do


@dataclass(frozen=True)
class Record:
    """One crop: its encoded image (b"" when the key is missing) and where it lies."""

    index: int
    image: bytes
    label: str | None
    database: str
    key: str


class Records(Protocol):
    """What readers need of records, all of a store's or some of them; numbered 0 .. len - 1."""

    @property
    def databases(self) -> tuple[Database, ...]:
        """Folders in order, with the numbers of their records."""

    @property
    def max_pixels(self) -> int:
        """The limit that readers pass to `probe`."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record:
        """See `RecordStore.record`."""

    def images(self, indices: Sequence[int]) -> list[bytes]:
        """See `RecordStore.images`."""

    def gather(
        self, indices: Sequence[int] | NDArray[np.int64], max_pixels: int, workers: Any = None
    ) -> Gathered:
        """See `RecordStore.gather`."""

    def label(self, index: int) -> str | None:
        """See `RecordStore.label`."""

    def labels(self, indices: Sequence[int]) -> list[str | None]:
        """See `RecordStore.labels`."""

    def locate(self, index: int) -> tuple[str, str]:
        """See `RecordStore.locate`."""

    def indices_of(self, which: int, numbers: Sequence[int]) -> list[int | None]:
        """See `RecordStore.indices_of`."""

    def fingerprint(self) -> dict[str, Any]:
        """See `RecordStore.fingerprint`."""

    def close(self) -> None:
        """See `RecordStore.close`."""


class RecordStore:
    """Read-only records of LMDB folders, numbered 0 .. len - 1 through the databases in order.

    Databases are opened at the first read of each process, so a store may cross a fork, and it pickles (paths
    and counts only). Reads from several threads are safe.

    Args:
        paths:      LMDB folders or files, or folders that hold them at any depth (sorted).
        max_pixels: the limit that readers of this store pass to `probe`.
    Raises:
        DataError: a path without a database, a database twice, or one that fails `check_database`.
    """

    databases: tuple[Database, ...]
    max_pixels: int

    def __init__(self, paths: Sequence[str | Path], *, max_pixels: int = MAX_PIXELS) -> None:
        databases: list[Database] = []
        count = 0
        for path in find_databases([paths] if isinstance(paths, str | Path) else paths):
            databases.append(check_database(path, count))
            count += databases[-1].count
        self._restore(tuple(databases), max_pixels)

    def _restore(self, databases: tuple[Database, ...], max_pixels: int) -> None:
        self.databases = databases
        self.max_pixels = max_pixels
        self._starts = [database.first_index for database in databases]
        self._to_index = np.array([d.first_index - d.first_number for d in databases], np.int64)
        """Added to the number in a record's key."""
        self._count = databases[-1].first_index + databases[-1].count
        self._environments: list[lmdb.Environment] = []  # or
        self._files: DatabaseFiles | None = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"databases": self.databases, "max_pixels": self.max_pixels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(**state)

    def __len__(self) -> int:
        return self._count

    def record(self, index: int) -> Record:
        """The record at `index`; IndexError outside 0 .. len - 1."""
        path, key = self.locate(index)
        return Record(int(index), self.images([index])[0], self.label(index), path, key)

    def images(self, indices: Sequence[int]) -> list[bytes]:
        """Encoded images in the order of `indices`, b"" for a missing key.

        Raises:
            IndexError: an index outside 0 .. len - 1.
            DataError:  a database is damaged.
        """
        return [value or b"" for value in self._values(indices, image_key)]

    def gather(
        self, indices: Sequence[int] | NDArray[np.int64], max_pixels: int, workers: Any = None
    ) -> Gathered:
        """Encoded images in the order of `indices` and the verdicts on their headers, without a `bytes` each.

        Args:
            indices:    B records.
            max_pixels: height x width allowed, 1 .. 2^40.
            workers:    `lmim_fast._C.Workers` that share the work; None: the calling thread alone.
        Raises:
            IndexError: an index outside 0 .. len - 1.
            ValueError: max_pixels out of range.
            DataError:  a database is damaged.
        """
        check_max_pixels(max_pixels)
        asked = np.asarray(indices, np.int64)
        if (strange := asked[(asked < 0) | (asked >= self._count)]).size:
            raise IndexError(f"record index {strange[0]} is outside 0 .. {self._count - 1}")
        files = self._opened()
        if files is None:
            return gather_in_python(self.images(asked.tolist()), max_pixels)
        databases = np.searchsorted(np.array(self._starts), asked, side="right") - 1
        return files.gather(databases, asked - self._to_index[databases], max_pixels, workers)

    def label(self, index: int) -> str | None:
        """The label at `index`, None when absent; bytes that are not UTF-8 become U+FFFD."""
        return self.labels([index])[0]

    def labels(self, indices: Sequence[int]) -> list[str | None]:
        """Labels in the order of `indices`, each as `label` gives it.

        Raises:
            IndexError: an index outside 0 .. len - 1.
            DataError:  a database is damaged.
        """
        return [
            None if value is None else value.decode("utf-8", errors="replace")
            for value in self.label_bytes(indices)
        ]

    def label_bytes(self, indices: Sequence[int]) -> list[bytes | None]:
        """Labels as the databases hold them, UTF-8 or not; otherwise as `labels`."""
        return self._values(indices, label_key)

    def raw_records(self, which: int) -> Iterator[tuple[bytes | None, bytes | None]]:
        """Image and label bytes of every record of the database at place `which`, in order, for copies.

        Yields:
            What is stored, None for what is absent.
        Raises:
            DataError: the database is damaged.
        """
        database = self.databases[which]
        numbers = range(database.first_number, database.last_number + 1)
        for start in range(0, len(numbers), _TOGETHER):
            some = numbers[start : start + _TOGETHER]
            keys = [key for number in some for key in (image_key(number), label_key(number))]
            values = self._read(which, keys)
            yield from zip(values[::2], values[1::2], strict=True)  # image and label take turns

    def locate(self, index: int) -> tuple[str, str]:
        """Database path and image key of `index`."""
        which, number = self._place(index)
        return self.databases[which].path, image_key(number).decode()

    def indices_of(self, which: int, numbers: Sequence[int]) -> list[int | None]:
        """Indices of records of the database at place `which`, by the numbers in their keys.

        Returns:
            In the order of `numbers`; None for a record that is not among these.
        """
        database = self.databases[which]
        there = range(database.first_number, database.last_number + 1)
        return [number + int(self._to_index[which]) if number in there else None for number in numbers]

    def fingerprint(self) -> dict[str, Any]:
        """What the data is, JSON-ready: the same on any machine and path, different when the data differs.

        Two hashes of a database cover its count and 64 evenly spread records: `hash` their images and labels,
        `images` their images alone.
        """
        databases = [
            {
                "name": os.path.basename(database.path),
                "count": database.count,
                "has_labels": database.has_labels,
                **self._hashes(which),
            }
            for which, database in enumerate(self.databases)
        ]
        return {"count": len(self), "databases": databases}

    def close(self) -> None:
        """Close this process's databases; a later read opens them again."""
        self._environments = []
        self._files = None
        self._process = -1

    def _values(self, indices: Sequence[int], key_of: Callable[[int], bytes]) -> list[bytes | None]:
        """Values of the records' keys in the order of `indices`, None where absent."""
        values: list[bytes | None] = [None] * len(indices)
        places: dict[int, list[tuple[int, int]]] = {}  # database -> (position in the batch, number)
        for position, index in enumerate(indices):
            which, number = self._place(index)
            places.setdefault(which, []).append((position, number))
        for which, parts in places.items():
            if key_of is label_key and not self.databases[which].has_labels:
                continue
            keys = [key_of(number) for _, number in parts]
            for (position, _), value in zip(parts, self._read(which, keys), strict=True):
                values[position] = value
        return values

    def _place(self, index: int) -> tuple[int, int]:
        """Place of the database, and the number in the record's key."""
        if not 0 <= index < self._count:
            raise IndexError(f"record index {index} is outside 0 .. {self._count - 1}")
        which = bisect.bisect_right(self._starts, index) - 1
        return which, int(index) - int(self._to_index[which])

    def _read(self, which: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values of the keys in one database, None where absent."""
        files = self._opened()
        if files is not None:
            return files.values(which, keys)
        return list(read_values(self.databases[which].path, self._environments[which], keys))

    def _opened(self) -> DatabaseFiles | None:
        """The databases for the native form; None if they are open for the Python one."""
        if self._process != os.getpid():
            paths = [database.path for database in self.databases]
            readahead = _fits_in_memory(paths)
            allow_open_files(len(paths))
            self._files = open_files(paths, readahead)
            if self._files is None:
                self._environments = [open_environment(path, readahead=readahead) for path in paths]
            self._process = os.getpid()
        return self._files

    def _hashes(self, which: int) -> dict[str, str]:
        count, first = self.databases[which].count, self.databases[which].first_number
        last = _FINGERPRINT_RECORDS - 1
        numbers = sorted({first + step * (count - 1) // last for step in range(_FINGERPRINT_RECORDS)})
        keys = [key for number in numbers for key in (image_key(number), label_key(number))]
        whole, images = (hashlib.blake2b(str(count).encode(), digest_size=16) for _ in range(2))
        for place, (key, value) in enumerate(zip(keys, self._read(which, keys), strict=True)):
            for digest in (whole,) if place % 2 else (whole, images):  # image and label take turns
                digest.update(b"%s %d " % (key, -1 if value is None else len(value)))
                digest.update(value or b"")
        return {"hash": whole.hexdigest(), "images": images.hexdigest()}


def _fits_in_memory(paths: Sequence[str]) -> bool:
    """Whether reading ahead helps: beyond half of the memory it only evicts pages that are still needed."""
    size = sum(os.path.getsize(data_file(path)) for path in paths)
    return size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
