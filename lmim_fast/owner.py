"""One process at a time writes a folder, on any file system.

Every process that wants a folder announces itself there by a file of a name of its own, `owner-TOKEN.json`,
and then looks whether it is alone. Nothing but creating, listing and deleting files is asked of the file
system: no locks, no links, no clocks of two machines that agree.

- *Two never hold it.* Of two that hold it each announced itself, then looked and saw no other. The one that
  announced itself later looked after that, so it saw the other's file, which an owner does not take back.
- *One of several gets it.* Who sees another one after announcing itself takes its own file back, waits a
  random time and tries again. It is refused only if it sees another one before it announces itself. Were all
  refused, so would be the one that took its file back last: but when it looked again, nobody's was there.
- *A dead one's file can be removed by anybody at any time*, since no name is used twice: there is no
  take-over that two could do at once.

Whether an owner is alive: on the same machine and in the same process namespace it is gone when its process
is, at once after kill -9, and not before, be it stopped or without parent. Elsewhere it is gone if its file,
which it rewrites every `BEAT` seconds, was not seen to change for `SILENCE` seconds. A process that was
silent for that long finds its file removed when it goes on: `Owner.lost` and `Owner.check` tell.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmim_fast.errors import LmimError, UsageError
from lmim_fast.process import Process, State

BEAT = 10.0
"""Seconds between two signs of life of an owner."""

SILENCE = 60.0
"""Seconds without one after which an owner of another machine is taken for dead."""

_LOOK_EVERY = 1.0  # seconds, while an owner of another machine is watched
_MOST_BYTES = 2**16  # of an owner's file
_NAME = re.compile(r"owner-[0-9a-f]{16}\.json")

Say = Callable[[str], None]


class Owner:
    """The right to write a folder: `acquire` until it is true, `release` at the end.

    Args:
        folder:  made, if it is not there; `release` removes what was made and is empty.
        shown:   what messages call it.
        beat:    seconds between two signs of life.
        silence: seconds without one after which an owner of another machine is taken for dead.
    """

    def __init__(
        self, folder: Path, shown: Path | None = None, *, beat: float = BEAT, silence: float = SILENCE
    ) -> None:
        self.folder, self._shown = folder, shown or folder
        self._beat, self._silence = beat, silence
        self.name = f"owner-{secrets.token_hex(8)}.json"
        """Of this process's file in the folder."""
        self._process = Process.this()
        self._made: list[Path] = []
        self._watched: dict[str, tuple[Any, float]] = {}
        self._announced, self.lost = False, False
        self._beats = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, say: Say) -> bool:
        """One try, of about a second at most; False: try again.

        Args:
            say: is told once for whom this process waits, and who is taken for dead.
        Raises:
            UsageError: another process has the folder; says which one and what to do.
            OSError:    the folder cannot be made, read or written.
        """
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._made += missing
        try:
            if self._somebody_is_watched(say):
                time.sleep(min(_LOOK_EVERY, self._silence / 10))
                return False
            self._announce()
            if self._others():
                self._withdraw()
                time.sleep(random.uniform(0.01, 0.2))
                return False
        except FileNotFoundError:  # removed or renamed by one that was about to end
            time.sleep(0.05)
            return False
        self._thread = threading.Thread(target=self._live, name="lmim-owner", daemon=True)
        self._thread.start()
        return True

    def check(self) -> None:
        """Look whether the folder is still this process's.

        Raises:
            LmimError: it is not; nothing more may be written there.
        """
        self._show_life()
        if not self.lost:
            return
        others = [process for name in self._others() if (process := self._read(name)[0]) is not None]
        who = f"{others[0]} has it" if others else f"{self.name} was removed from it"
        raise LmimError(
            f"{self._shown} is no longer this process's: {who}. A process that shows no life for "
            f"{self._silence:.0f} seconds loses its folder, and so does one whose folder is moved. Nothing "
            "more is written there; run the same command again when nobody else uses the folder"
        )

    def rename(self, target: Path) -> None:
        """Give the folder its final name; what others left there by being refused goes.

        Raises:
            LmimError: the folder is not this process's any more.
            OSError:   it cannot be renamed.
        """
        self.check()
        with self._lock:
            os.rename(self.folder, target)
            self.folder = target
        for name in self._others():
            (target / name).unlink(missing_ok=True)

    def release(self) -> None:
        """Leave the folder to others; also right if it was never acquired."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):  # gone with the folder, or out of reach: it ends with the process
            self._withdraw()
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()
        self._made = []

    def _others(self) -> list[str]:
        """Names of the files of all others."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            if self._announced:
                return []
            raise
        return [name for name in names if _NAME.fullmatch(name) and name != self.name]

    def _somebody_is_watched(self, say: Say) -> bool:
        """Remove the files of the dead; whether there is one of whom that is not known yet."""
        watched = False
        for name in self._others():
            process, sign = self._read(name)
            state: State = "unknown" if process is None else process.state()
            if state in ("runs", "stopped"):
                self._refuse(process, state)
            if state == "unknown":
                who = process or f"a process whose {name} cannot be read"
                if name not in self._watched:
                    self._watched[name] = sign, time.monotonic()
                    say(
                        f"{self._shown} is {who}'s, which cannot be looked at from here: waiting up to "
                        f"{self._silence:.0f} seconds for a sign of life"
                    )
                first, since = self._watched[name]
                if sign != first:
                    self._refuse(process, state)
                if time.monotonic() - since < self._silence:
                    watched = True
                    continue
                say(f"{who} showed no life for {self._silence:.0f} seconds: {self._shown} is taken over")
            (self.folder / name).unlink(missing_ok=True)
        return watched

    def _refuse(self, process: Process | None, state: State) -> None:
        who = "a process that cannot be told" if process is None else str(process)
        stop = "stop that process" if process is None else f"stop it (kill {process.pid} on {process.host})"
        halted = ", which is stopped by a signal (kill -CONT lets it go on)" if state == "stopped" else ""
        raise UsageError(
            f"{self._shown} is being written by {who}{halted}: wait for its end, {stop}, or choose another "
            f"--output{_started_alone()}"
        )

    def _read(self, name: str) -> tuple[Process | None, Any]:
        """Who a file names, and what changes with every sign of life."""
        path = self.folder / name
        try:
            # Opened anew each time: network file systems ask the server then, not their cache.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None, None
        except OSError:  # another user's
            status = os.stat(path, follow_symlinks=False)
            return None, (status.st_mtime_ns, status.st_size)
        try:
            status, text = os.fstat(handle), os.read(handle, _MOST_BYTES)
        except OSError:  # not a file
            text = b""
        finally:
            os.close(handle)
        return Process.read(text), (status.st_mtime_ns, status.st_size, text)

    def _content(self) -> bytes:
        self._beats += 1
        return json.dumps({**asdict(self._process), "beat": self._beats}).encode() + b"\n"

    def _announce(self) -> None:
        path = self.folder / self.name
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._announced = True
        try:
            os.write(handle, self._content())
        except OSError:
            self._withdraw()
            raise
        finally:
            os.close(handle)

    def _withdraw(self) -> None:
        if self._announced:
            self._announced = False
            (self.folder / self.name).unlink(missing_ok=True)

    def _live(self) -> None:
        while not self._closed.wait(self._beat):
            self._show_life()

    def _show_life(self) -> None:
        with self._lock:
            try:
                handle = os.open(self.folder / self.name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                self.lost = True
                return
            except OSError:  # a file system that is away for a while says nothing of who owns it
                return
            try:
                with contextlib.suppress(OSError):
                    os.pwrite(handle, self._content(), 0)  # in place: never shorter than before
            finally:
                os.close(handle)


@contextlib.contextmanager
def owned(folder: Path, say: Say) -> Iterator[Owner]:
    """A block in which this process alone writes the folder; waits where `Owner.acquire` says so.

    Raises:
        UsageError: another process has the folder.
        OSError:    the folder cannot be made, read or written.
    """
    owner = Owner(folder)
    try:
        while not owner.acquire(say):
            pass
        yield owner
    finally:
        owner.release()


_STARTERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "SLURM_NTASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}


def _started_alone() -> str:
    """A hint for processes of a job that were started without torchrun."""
    for variable, starter in _STARTERS.items():
        count = os.environ.get(variable, "")
        if "RANK" not in os.environ and count.isdigit() and int(count) > 1:
            return (
                f". {starter} started {count} processes ({variable}), and each takes itself for the only "
                "one: let it start one torchrun on each machine instead"
            )
    return ""
