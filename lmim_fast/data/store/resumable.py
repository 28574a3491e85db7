"""A writer that goes on where a killed one stopped: records and position are committed together."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lmim_fast import durable, faults
from lmim_fast.data.store.databases import COUNT_KEY, lmdb
from lmim_fast.data.store.writer import PARTIAL_FILE, LmdbWriter
from lmim_fast.errors import UsageError

# A commit waits for the disk. It is due when one of these is pending:
RECORDS_PER_COMMIT = 10_000
BYTES_PER_COMMIT = 2**25
SECONDS_PER_COMMIT = 10.0
_FIRST_MAP = 2**30  # bytes; the map is doubled when it is full
_IDENTITY_FILE = "resume.json"
_STATE_KEY = b"~unfinished"  # deleted by the last transaction


class ResumableWriter(LmdbWriter):
    """An `LmdbWriter` whose unfinished database outlives an error, Ctrl-C and `kill -9`.

    The caller says with each `commit` how far it has come. A later writer of the same output and identity has
    that `state` and the records before it; a caller that goes on from there writes every record once. At the
    end the state is removed, so a resumed database holds what an uninterrupted one holds.

        with ResumableWriter(output, {"seed": 0}) as writer:
            if not writer.complete:
                for number in range(writer.state.get("next", 0), count):
                    writer.put(*make(number))
                    if writer.commit_is_due():
                        writer.commit({"next": number + 1})

    Args:
        output:     folder of the new LMDB; its parents are made.
        identity:   what the records are made of and how, as JSON values by name.
        restart:    delete what an earlier writer left instead of going on from there.
        side_files: names of files that the caller keeps in `folder`; they come with the database.
    Raises:
        UsageError: see `LmdbWriter`; or the unfinished database has another identity, or cannot be read.
        LmimError:  a write failed; what was committed stays.
    """

    def __init__(
        self,
        output: str | Path,
        identity: Mapping[str, Any],
        *,
        restart: bool = False,
        side_files: Sequence[str] = (),
    ) -> None:
        super().__init__(output, 0)
        self.state: dict[str, Any] = {}
        """What the last commit said; empty at the start."""
        self.committed = 0
        """Records that are safe."""
        self.complete = False
        """Whether the earlier writer had written everything, so that only the final names are missing."""
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))  # as a file gives it back
        self._restart = restart
        self._side_files = tuple(side_files)
        self._pending_bytes = 0
        self._last_commit = time.monotonic()

    def put(self, image: bytes, label: str | bytes | None) -> None:
        """Append one record; it is safe after the next `commit`."""
        self.written += 1
        self._append(image, label)
        self._pending_bytes += len(image)

    def commit_is_due(self) -> bool:
        """Whether so much is pending that it is time for a transaction."""
        return (
            self.written - self.committed >= RECORDS_PER_COMMIT
            or self._pending_bytes >= BYTES_PER_COMMIT
            or (self.written > self.committed and time.monotonic() - self._last_commit >= SECONDS_PER_COMMIT)
        )

    def commit(self, state: Mapping[str, Any]) -> None:
        """Write the pending records and the position behind them, both or neither, onto the disk.

        Raises:
            LmimError: the write failed.
        """
        value = json.dumps({"written": self.written, "state": dict(state)}).encode()
        self._pending.append((_STATE_KEY, value))
        self._commit()
        self.committed, self.state = self.written, dict(state)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            with contextlib.suppress(OSError):  # without it the database is no less complete
                (self.output / _IDENTITY_FILE).unlink()

    def _files(self) -> tuple[str, ...]:
        named = (_IDENTITY_FILE, *self._side_files)
        return (*super()._files(), *named, *(durable.temporary_name(Path(name)).name for name in named))

    def _remove_leftovers(self) -> None:
        """Keep what can be resumed, after a check that it is of the same command."""
        self._refuse_foreign_files()
        earlier = None if self._restart else self._earlier_identity()
        if earlier is not None:
            self._ours = False  # a refusal deletes nothing
            self._require_same(earlier)
            self._ours = True
            return
        self._delete_files()
        durable.write_file(self.folder / _IDENTITY_FILE, json.dumps(self._identity, indent=1).encode())

    def _earlier_identity(self) -> dict[str, Any] | None:
        try:
            identity = json.loads((self.folder / _IDENTITY_FILE).read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            self._ours = False
            raise UsageError(f"{self.folder}: {_IDENTITY_FILE} is damaged; restart, or remove it") from error
        return identity if isinstance(identity, dict) else {}

    def _require_same(self, earlier: dict[str, Any]) -> None:
        for name in sorted({*earlier, *self._identity}):
            before, now = earlier.get(name), self._identity.get(name)
            if before != now:
                raise UsageError(
                    f"{self.folder} is unfinished, made with {_difference(name, before, now)}; give the same"
                    " to continue it, or --restart to begin anew"
                )

    def _open(self) -> None:
        finished = self.folder / "data.mdb"
        if finished.exists():  # killed between the two renames
            os.rename(finished, self.folder / PARTIAL_FILE)
        path = self.folder / PARTIAL_FILE
        size = path.stat().st_size if path.exists() else 0
        self._map_size = max(_FIRST_MAP, 2 * size)
        try:
            self._environment = lmdb.open(
                str(path), map_size=self._map_size, subdir=False, lock=False, meminit=False
            )
            with self._environment.begin() as transaction:
                saved, count = transaction.get(_STATE_KEY), transaction.get(COUNT_KEY)
        except lmdb.Error as error:
            if size:
                self._ours = False
                raise UsageError(
                    f"{self.folder} cannot be continued ({error}); --restart begins anew"
                ) from error
            raise
        if saved is not None:
            progress = json.loads(saved)
            self.written, self.state = progress["written"], progress["state"]
        elif count is not None:
            self.written, self.complete = int(count), True
        self.committed = self.written

    def _commit(self) -> None:
        super()._commit()
        self._pending_bytes = 0
        self._last_commit = time.monotonic()

    def _write(self, transaction: lmdb.Transaction) -> None:
        faults.point("records")
        super()._write(transaction)
        if self._pending and self._pending[-1][0] == COUNT_KEY:
            transaction.delete(_STATE_KEY)

    def _finish(self) -> None:
        faults.point("publish")
        super()._finish()

    def _abandon(self) -> None:
        """Keep what was committed; without any, leave nothing."""
        if hasattr(self, "_environment"):
            self._environment.close()
        if self._ours and not self.committed and not self.complete:
            with contextlib.suppress(OSError):
                self._delete_files()
        self._leave()

    def kept(self) -> str:
        """What an interruption leaves, for people."""
        if not self.committed:
            return "nothing was kept"
        return (
            f"{self.committed} records are kept in {self.folder}, and the same command continues from there"
        )


def _difference(name: str, before: Any, now: Any) -> str:
    """What has another value; one with parts is too long to be shown."""
    if isinstance(before, dict | list) or isinstance(now, dict | list):
        return f"other {name} than now"
    return f"another {name} ({json.dumps(before)}, now {json.dumps(now)})"
