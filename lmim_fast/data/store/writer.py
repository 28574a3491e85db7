"""Writes an LMDB in the field's layout so that it exists completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from lmim_fast import durable
from lmim_fast.data.store.databases import COUNT_KEY, image_key, label_key, lmdb
from lmim_fast.errors import LmimError, UsageError
from lmim_fast.owner import Owner

RECORDS_PER_COMMIT = 1000
BYTES_PER_RECORD = 2**18  # of the map, not of the file: above most crops' size; a full map is doubled
BYTES_AT_LEAST = 2**26
PARTIAL_FILE = "records.partial"
_DISK_IS_FULL_BELOW = 2**20  # bytes free; a failed write is then reported as a full disk


class LmdbWriter:
    """Context manager: `put` records, and the database appears under `output` when the block ends well.

    Until then it is the file `records.partial` in the folder `OUTPUT.partial`, which no reader takes for a
    database. An exception removes it; what a killed process left, the next writer of this output removes.

    Args:
        output:  folder of the new LMDB (`data.mdb`); its parents are made.
        count:   records that will be put, for the size of the memory map at first.
    Raises:
        UsageError: the output exists and is not an empty folder, cannot be made, or is being written already.
        LmimError:  a write failed, for one because the disk is full.
    """

    def __init__(self, output: str | Path, count: int) -> None:
        self.output = Path(os.path.abspath(output))
        self.folder = self.output.with_name(self.output.name + ".partial")
        self.written = 0
        self._flushed = False
        self._ours = False  # whether the files in the partial folder may be removed
        self._owner = Owner(self.folder, self.output)
        self._map_size = BYTES_AT_LEAST + count * BYTES_PER_RECORD
        self._pending: list[tuple[bytes, bytes]] = []

    def __enter__(self) -> Self:
        check_output_is_free(self.output)
        # A finished folder takes this name at the end, which neither can give up.
        if self.output.is_symlink():
            raise UsageError(f"{self.output} is a link; name the folder that it leads to")
        if self.output.is_mount():
            raise UsageError(f"{self.output} is a mount point; name a folder in it, {self.output / 'crops'}")
        if self.folder.is_symlink():
            raise UsageError(f"{self.folder} is needed for the unfinished LMDB but is a link; remove it")
        try:
            while not self._owner.acquire(_to_stderr):
                pass
            check_output_is_free(self.output)  # another writer may have ended by now
            self._ours = True
            self._remove_leftovers()
            self._open()
        except (OSError, lmdb.Error) as error:
            self._abandon()
            raise UsageError(f"cannot write the LMDB {self.output}: {_reason(error)}") from error
        except BaseException:
            self._abandon()
            raise
        return self

    def put(self, image: bytes, label: str | bytes | None) -> None:
        """Append one record; a label that is bytes is stored as it is.

        Raises:
            LmimError: the write failed.
        """
        self.written += 1
        self._append(image, label)
        if self.written % RECORDS_PER_COMMIT == 0:
            self._commit()

    def flush(self) -> None:
        """Bring all records onto the disk; nothing may be put after it, and the block's end only gives names.

        Raises:
            LmimError: the write failed.
        """
        if self._flushed:
            return
        self._pending.append((COUNT_KEY, b"%d" % self.written))
        self._commit()
        try:
            self._environment.sync(True)
        except (OSError, lmdb.Error) as error:
            raise LmimError(self._failure(error)) from error
        self._flushed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self.flush()
            self._finish()
        except BaseException:
            self._abandon()
            raise
        self._owner.release()

    def _append(self, image: bytes, label: str | bytes | None) -> None:
        self._pending.append((image_key(self.written), image))
        if label is not None:
            text = label.encode() if isinstance(label, str) else label
            self._pending.append((label_key(self.written), text))

    def _files(self) -> tuple[str, ...]:
        """Names that a writer may have left in the partial folder."""
        return (PARTIAL_FILE, "data.mdb")

    def _remove_leftovers(self) -> None:
        """Delete what a killed writer left, and nothing else."""
        self._refuse_foreign_files()
        self._delete_files()

    def _refuse_foreign_files(self) -> None:
        known = {*self._files(), self._owner.name}
        foreign = [path.name for path in self.folder.iterdir() if path.name not in known or path.is_symlink()]
        if foreign:
            self._ours = False
            raise UsageError(
                f"{self.folder} is needed for the unfinished LMDB but holds {foreign[0]}; remove it"
            )

    def _delete_files(self) -> None:
        for name in self._files():
            (self.folder / name).unlink(missing_ok=True)

    def _open(self) -> None:
        self._environment = lmdb.open(
            str(self.folder / PARTIAL_FILE),
            map_size=self._map_size,
            subdir=False,
            lock=False,
            sync=False,
            meminit=False,
        )

    def _commit(self) -> None:
        try:
            while True:
                try:
                    with self._environment.begin(write=True) as transaction:
                        self._write(transaction)
                    break
                except lmdb.MapFullError:
                    self._map_size *= 2
                    self._environment.set_mapsize(self._map_size)
        except (OSError, lmdb.Error) as error:
            raise LmimError(self._failure(error)) from error
        self._pending.clear()

    def _write(self, transaction: lmdb.Transaction) -> None:
        for key, value in self._pending:
            transaction.put(key, value)

    def _finish(self) -> None:
        """The names that readers look for, now that everything is on the disk."""
        try:
            self._environment.close()
            os.rename(self.folder / PARTIAL_FILE, self.folder / "data.mdb")
            durable.flush_folder(self.folder)
            self._owner.rename(self.output)
            durable.flush_folder(self.output.parent)
        except (OSError, lmdb.Error) as error:
            raise LmimError(self._failure(error)) from error

    def _abandon(self) -> None:
        if hasattr(self, "_environment"):
            self._environment.close()
        if self._ours:
            with contextlib.suppress(OSError):
                self._delete_files()
        self._leave()

    def _leave(self) -> None:
        """Let another writer come; without anything to go on from, the folder goes too."""
        self._owner.release()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _failure(self, error: Exception) -> str:
        free = durable.free_bytes(self.folder)
        full = free is not None and free < _DISK_IS_FULL_BELOW
        reason = f"the disk is full ({free} bytes free)" if full else _reason(error)
        return f"writing the LMDB {self.output} failed at record {self.written}: {reason}; {self.kept()}"

    def kept(self) -> str:
        """What a failure leaves, for people."""
        return "nothing was kept"


def check_output_is_free(output: Path) -> None:
    """Refuse a path that is not free.

    Raises:
        UsageError: `output` is a file or a folder with something in it.
    """
    try:
        if (output / "data.mdb").exists():
            raise UsageError(f"{output} holds an LMDB already; choose another output or remove it first")
        if output.is_dir() and any(output.iterdir()):
            raise UsageError(f"{output} is not empty; choose another output or empty it first")
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output} is a file; the output must be a new folder")
    except OSError as error:
        raise UsageError(f"cannot write the LMDB {output}: {_reason(error)}") from error


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    if os.strerror(errno.ENODEV) in str(error):  # as LMDB says it
        return f"{error}; its file system cannot map files into memory; write on a local disk, then copy it"
    return str(error)
