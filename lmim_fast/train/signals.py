"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class StopSignals:
    """Remembers a request to stop until the step is done."""

    received = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Signal handler; a second Ctrl-C does not wait."""
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """SIGTERM, SIGUSR1 and Ctrl-C end the run after a checkpoint, at the next step's end."""
    handler = StopSignals()
    previous = {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield handler
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
