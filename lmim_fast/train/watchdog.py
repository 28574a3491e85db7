"""A process that no longer gets on says where it stands, and ends, so that the group is restarted."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from lmim_fast.train.world import waits_for_peers

GRACE = 15.0
"""Seconds between the stacks and the end: peers that wait for the same thing write theirs meanwhile, and so
does NCCL, whose timeout began a little later, with the collective."""

PAUSED = 12
"""Times the timeout: two hours by default, longer than any validation that is in order."""

COLLECTIVE_GRACE = 5.0
"""Seconds that a collective waits longer than the watchdog: a rank whose peer hangs writes its stacks before
its collective fails and it ends."""

_STDERR = 2  # the descriptor: sys.stderr may be another object, whose lock a hung thread may hold


def _end() -> None:
    os._exit(1)  # not sys.exit: the main thread is the one that hangs


class Watchdog:
    """Ends this process if `beat` is not called for `timeout` seconds; context manager around the steps.

    A thread looks at the last beat. When it is too old, the stacks of all threads go to stderr and, added at
    its end, to RUN/stacks-rank{rank}.txt, under a line that says rank, last beat and age. After `grace`
    seconds the process ends with status 1, unless the block has ended by then, with an error for instance.
    Should foreign code hold the interpreter's lock, so that no Python thread can run, a timer of
    `faulthandler` writes the stacks to stderr alone and ends the process a little later.

    One at a time in a process: it has `faulthandler`'s only timer.

    Args:
        timeout: seconds, as long as the longest step and save that are in order.
        run:     folder of the run; it exists.
        rank:    of this process.
        grace:   seconds from the stacks to the end.
        end:     how the process ends; tests put something milder in its place.
    """

    def __init__(
        self,
        timeout: float,
        run: Path,
        rank: int,
        *,
        grace: float = GRACE,
        end: Callable[[], None] = _end,
    ) -> None:
        self._timeout, self._grace, self._end = timeout, grace, end
        self._path, self._rank = run / f"stacks-rank{rank}.txt", rank
        self._look_every = min(1.0, timeout / 10)
        self._last: tuple[float, str] = (time.monotonic(), "the start")
        self._paused = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lmim-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat("the start")
        self._arm(self._timeout + self._grace + self._look_every)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()

    def beat(self, what: str) -> None:
        """This process gets on; `what` it has just done. Takes less than a microsecond."""
        self._last = (time.monotonic(), what)

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """A block of unknown length, such as compiling or a validation, with `PAUSED` times the time."""
        self._paused += 1
        try:
            yield
        finally:
            self.beat(what)
            self._paused -= 1

    def _watch(self) -> None:
        try:
            while not self._closed.wait(self._look_every):
                since, what = self._last
                age = time.monotonic() - since
                if age < self._timeout * (PAUSED if self._paused else 1):
                    self._arm(self._timeout + self._grace + self._look_every)
                    continue
                self._arm(2 * self._grace + self._look_every)  # the disk that stacks are written to may hang
                self._report(what, age)
                if not self._closed.wait(self._grace):
                    self._end()
                return
        finally:
            faulthandler.cancel_dump_traceback_later()

    @staticmethod
    def _arm(seconds: float) -> None:
        # Written and ended by a thread of C, which needs no lock of the interpreter. From now on, and armed
        # again at every look: it acts only if this thread is kept from running.
        faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)

    def _report(self, what: str, age: float) -> None:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        does = "waits for another rank, which hangs or has ended" if waits_for_peers() else "hangs"
        threads = "".join(
            f"  0x{thread.ident or 0:016x} is {thread.name}\n" for thread in threading.enumerate()
        )
        head = (
            f"\n{now} rank {self._rank} (process {os.getpid()}) {does}: nothing for {age:.0f} seconds since "
            f"{what}. Stacks of its threads, the latest call first:\n{threads}"
        ).encode()
        with contextlib.suppress(OSError):  # nobody reads stderr: the file is the other place
            os.write(_STDERR, head)
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        try:
            with self._path.open("ab") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.write(_STDERR, f"warning: cannot write {self._path}: {error}\n".encode())


def flight_recorder_environment(run: Path) -> dict[str, str]:
    """What makes NCCL's Flight Recorder write the last collectives of every rank when one times out.

    The files are RUN/nccl-rank-N; PyTorch's `torchfrtrace` reads them. To be added to the environment before
    `init_process_group`; other backends do not read it. What the user has set is left out. Names as in
    PyTorch 2.9 and later.
    """
    wanted = {
        "TORCH_FR_BUFFER_SIZE": "2000",  # collectives that are kept: PyTorch's own default
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{run.resolve()}/nccl-rank-",  # the rank comes behind it
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    }
    unset = {name: value for name, value in wanted.items() if name not in os.environ}
    # torchrun sets 1 where nothing is set, and by that communicators are aborted before the dump:
    # https://github.com/pytorch/pytorch/issues/121055
    if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "1":
        unset["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"
    return unset
