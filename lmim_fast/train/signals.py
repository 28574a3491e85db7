"""What asks a run to stop: signals, and the end of the torchrun that started it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import time
from collections.abc import Iterator
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
ORPHANED = 1000
"""Stands for the end of torchrun where a signal's number is expected."""

_READER_ENDS_WITHIN = 0.3  # seconds: of a `tee` that the same signal ends

# Asked here, as early as this process can: torchrun may end while the run starts.
_PARENT = os.getppid()


def name_of(number: int) -> str:
    """A signal's name, or what `ORPHANED` means."""
    if number == ORPHANED:
        return "the end of torchrun (the process that started the ranks of a machine is gone)"
    return signal.Signals(number).name


class StopSignals:
    """Remembers a request to stop until the step is done."""

    def __init__(self) -> None:
        self._number = 0
        # Another process takes orphans, so the parent's number changes. The kernel could send a signal then
        # (PR_SET_PDEATHSIG), but sends it when the *thread* that started this process ends.
        self._has_agent = "TORCHELASTIC_RUN_ID" in os.environ

    @property
    def received(self) -> int:
        """Number of the last signal, `ORPHANED` if this rank's torchrun is gone, or 0; cheap."""
        if not self._number and self._has_agent and os.getppid() != _PARENT:
            _leave_terminal()
            return ORPHANED
        return self._number

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Signal handler; a second Ctrl-C does not wait."""
        if self._number == number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            _leave_terminal()
        self._number = number


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """SIGTERM, SIGUSR1, SIGHUP and Ctrl-C end the run after a checkpoint, at the next step's end.

    So does the end of torchrun, where that started the process. A SIGHUP that is ignored already, by nohup,
    stays so.
    """
    handler = StopSignals()
    wanted = [n for n in STOPPING if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield handler
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _leave_terminal() -> None:
    """What showed the output may end too: where nobody reads it any more, it goes nowhere.

    A write would fail otherwise, and the run with it, before its checkpoint.
    """
    broken = select.poll()
    outputs = {number for number in (1, 2) if not _is_file(number)}
    for number in outputs:
        broken.register(number, 0)  # errors are told without being asked for
    until = time.monotonic() + _READER_ENDS_WITHIN
    while outputs and time.monotonic() < until:
        for number, _ in broken.poll(20):
            broken.unregister(number)
            outputs.discard(number)
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), number)
        if not outputs:
            break
        time.sleep(0.01)


def _is_file(number: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(number).st_mode)
    except OSError:  # closed
        return True
