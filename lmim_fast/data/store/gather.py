"""The images of a batch in one block of memory, with the verdicts on their headers; and values of any keys.

Two forms with equal results. The native one walks the databases' trees itself (`csrc/lmdb_file.h`), so that
several threads look up, read and probe without the interpreter's lock, and that pages which a writer uses
again meanwhile are no danger; the Python one asks py-lmdb.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.store import rare_formats
from lmim_fast.data.store.databases import image_key, refusal
from lmim_fast.data.store.probe import probe
from lmim_fast.data.store.snapshots import busy
from lmim_fast.data.store.tree import data_file
from lmim_fast.errors import DataError
from lmim_fast.native import native

# Images lie at equal distances if that takes no more: 128 KB for each of 256. Other batches are packed.
RECTANGLE_BYTES = 2**25
_REOPENED_AT_MOST = 5  # times a batch is tried again after a database was opened anew

T = TypeVar("T")


@dataclass
class EncodedImages:
    """B encoded images in one block of memory."""

    arena: NDArray[np.uint8]
    stride: int
    """Bytes from one image to the next, or 0 where they follow each other closely."""
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """(B,) place and size in the arena."""
    _elsewhere: dict[int, NDArray[np.uint8]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """The image's bytes, a view."""
        if row in self._elsewhere:
            return self._elsewhere[row]
        start = self.offsets[row]
        return self.arena[start : start + self.lengths[row]]

    def put(self, row: int, image: NDArray[np.uint8]) -> None:
        """Another image in `row`: in its place if that is large enough, else the array itself is kept."""
        if len(image) <= self.stride:
            start = self.offsets[row]
            self.arena[start : start + len(image)] = image
            self._elsewhere.pop(row, None)
        else:
            self._elsewhere[row] = image
        self.lengths[row] = len(image)

    def rectangle(self) -> NDArray[np.uint8] | None:
        """(B, stride) view: images, and anything behind them. None if some lie elsewhere."""
        if not self.stride or self._elsewhere:
            return None
        return self.arena.reshape(len(self), self.stride)


@dataclass
class Gathered:
    """Images of a batch and the verdicts on their headers: see `probe.Probe`."""

    encoded: EncodedImages
    status: NDArray[np.uint8]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]


class DatabaseFiles:
    """The files of databases, mapped into this process by `lmim_fast._C` until the last reference goes.

    Use `open_files`.
    """

    def __init__(self, paths: Sequence[str], readahead: bool) -> None:
        self._paths, self._readahead, self._native = paths, readahead, native()
        self._files = [self._open(path) for path in paths]

    def gather(
        self,
        databases: NDArray[np.int64],
        numbers: NDArray[np.int64],
        max_pixels: int,
        workers: Any,
    ) -> Gathered:
        """The images `image-%09d` with these numbers of these databases.

        Args:
            databases:  (B,) places in `paths`.
            numbers:    (B,) as they stand in the keys.
            max_pixels: see `probe`.
            workers:    `lmim_fast._C.Workers` that share the work, or None.
        Raises:
            DataError: a database is damaged, its disk fails, or it is written too fast to be read.
        """
        return self._retried(
            lambda: self._gather(databases, numbers, max_pixels, workers),
            lambda row: (int(databases[row]), image_key(int(numbers[row]))),
        )

    def values(self, which: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of the keys in the database at place `which`, None where absent.

        Raises:
            DataError: as `gather`.
        """
        found: list[bytes | None] = self._retried(
            lambda: self._native.values(self._files[which], keys), lambda row: (which, keys[row])
        )
        return found

    def _retried(self, read: Callable[[], T], asked: Callable[[int], tuple[int, bytes]]) -> T:
        """What `read` returns; a database that it cannot read is opened anew a few times.

        Args:
            asked: place of the database and key, by the row that an error of the native form names.
        """
        reopened = 0
        while True:
            try:
                return read()
            except self._native.LmdbBusy as error:
                which, key = asked(error.args[1])
                raise busy(self._paths[which], key.decode()) from error
            except (self._native.LmdbDamaged, self._native.LmdbRefused) as error:
                which, key = asked(error.args[1])
                if reopened == _REOPENED_AT_MOST:
                    raise self._unreadable(error, f"{self._paths[which]}: {key.decode()}") from error
            # Perhaps a database that is being written outgrew its map, or its disk comes back.
            reopened += 1
            try:
                self._files[which] = self._open(self._paths[which])
            except self._native.LmdbUnsupported as error:
                raise DataError(f"a database was changed while it was read ({error}); start again") from error

    def _unreadable(self, error: Exception, record: str) -> DataError:
        reason = error.args[0]
        if isinstance(error, self._native.LmdbRefused):
            return refusal(record, OSError(reason, os.strerror(reason)))
        return DataError(f"{record} cannot be read ({reason}); copy or write the database again")

    def _gather(
        self, databases: NDArray[np.int64], numbers: NDArray[np.int64], max_pixels: int, workers: Any
    ) -> Gathered:
        arena, stride, offsets, lengths, status, heights, widths = self._native.gather(
            self._files, databases, numbers, max_pixels, RECTANGLE_BYTES, workers
        )
        encoded = EncodedImages(arena, stride, offsets, lengths)
        rare_formats.complete(status, heights, widths, lambda row: encoded[row].tobytes(), max_pixels)
        return Gathered(encoded, status, heights, widths)

    def _open(self, path: str) -> Any:
        file = data_file(path)
        try:
            return self._native.LmdbFile(os.fsencode(file), self._readahead)
        except OSError as error:
            raise refusal(file, error) from error
        except self._native.LmdbDamaged as error:
            raise DataError(f"{path}: damaged ({error}); copy or write the database again") from error


def open_files(paths: Sequence[str], readahead: bool) -> DatabaseFiles | None:
    """Databases for the native form; None, with a warning, if it cannot read them.

    Raises:
        DataError: a database is damaged.
    """
    module = native()
    if module is None:
        return None
    try:
        return DatabaseFiles(paths, readahead)
    except module.LmdbUnsupported as error:
        warnings.warn(
            f"py-lmdb reads the databases, in one thread: {error}. The results are the same.", stacklevel=3
        )
        return None


def gather_in_python(images: Sequence[bytes], max_pixels: int) -> Gathered:
    """The Python form of `DatabaseFiles.gather`; the results are equal.

    Args:
        images:     B encoded images, b"" where a key is absent.
        max_pixels: see `probe`.
    """
    lengths = np.array([len(image) for image in images], np.int64)
    longest = int(lengths.max(initial=0))
    stride = longest if 0 < longest <= RECTANGLE_BYTES // len(images) else 0
    if stride:
        offsets = stride * np.arange(len(images), dtype=np.int64)
        arena = np.empty(stride * len(images), np.uint8)
        for offset, image in zip(offsets.tolist(), images, strict=True):
            arena[offset : offset + len(image)] = np.frombuffer(image, np.uint8)
    else:
        offsets = np.cumsum(lengths) - lengths
        arena = np.frombuffer(bytearray(b"".join(images)), np.uint8)
    return Gathered(EncodedImages(arena, stride, offsets, lengths), *probe(images, max_pixels))
