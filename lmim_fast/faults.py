"""Faults at named points of a run, for tests: off, and one comparison a point, in normal runs.

`LMIM_FAST_FAULTS="save@2=kill, step@7:rank1:life0=hang"` kills a process at the second time that it writes a
file of a checkpoint, and stops rank 1 at its seventh step, but not again after torchrun has restarted the
group. A fault says on stderr that it acts. `injected` does the same inside a process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

VARIABLE = "LMIM_FAST_FAULTS"

Point = Literal["step", "gather", "save", "commit", "retention", "batch", "evaluation", "records", "publish"]
"""step: before an optimiser step; gather: before a checkpoint's tensors are copied to the host; save: after a
file of it is written; commit: before its folder gets its name; retention: before an old one is deleted;
batch: in the thread that prepares batches; evaluation: before held-out data is measured; records: before a
transaction of a resumable LMDB; publish: before that LMDB gets its name."""
Action = Literal["kill", "term", "raise", "full", "memory", "hang", "slow"]
"""kill, term: signal 9 or 15 to this process; raise: RuntimeError; full: a full disk's OSError; memory: the
error of a device without memory; hang: for ever; slow: half a second."""

_FAULT = re.compile(
    r"(?P<point>[a-z]+)(@(?P<at>\d+))?(:rank(?P<rank>\d+))?(:life(?P<life>\d+))?=(?P<action>[a-z]+)"
)
_SLOW_SECONDS = 0.5
_STDERR = 2  # the descriptor, at once: a killed process flushes nothing


@dataclass
class Fault:
    """One fault.

    Args:
        at:   the passing of the point at which it acts, counted from 1 in each process; 0: at every one.
        rank: the process that it acts in; None: all.
        life: the restarts of the group, by torchrun, after which it acts (0: before any); None: always.
    """

    point: Point
    action: Action
    at: int = 0
    rank: int | None = None
    life: int | None = None
    passed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.point not in get_args(Point) or self.action not in get_args(Action):
            raise ValueError(
                f"no fault {self.point}={self.action}: points are {', '.join(get_args(Point))}, "
                f"actions {', '.join(get_args(Action))}"
            )

    def passes(self) -> bool:
        """Count a passing of the point; whether the fault acts at it."""
        self.passed += 1
        here = self.rank in (None, int(os.environ.get("RANK", "0")))
        now = self.life in (None, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
        return here and now and self.at in (0, self.passed)


_armed: list[Fault] = []


def point(name: Point) -> None:
    """A place where a fault can be: does nothing unless one was armed for it."""
    if _armed:
        for fault in _armed:
            if fault.point == name and fault.passes():
                _act(fault)


def parse(text: str) -> list[Fault]:
    """The faults that a text such as `save@2=kill, step:rank1=slow` names.

    Raises:
        ValueError: it names none, or an unknown point or action.
    """
    faults = []
    for part in filter(None, map(str.strip, text.split(","))):
        match = _FAULT.fullmatch(part)
        if match is None:
            raise ValueError(f"{VARIABLE}: {part!r} is not POINT[@N][:rankR][:lifeL]=ACTION")
        rank, life = (None if match[name] is None else int(match[name]) for name in ("rank", "life"))
        where = match["point"], match["action"]
        faults.append(Fault(*where, int(match["at"] or 0), rank, life))  # type: ignore[arg-type]
    return faults


def arm_from_environment() -> None:
    """Arm what the environment names; a run calls it once at its start."""
    text = os.environ.get(VARIABLE)
    if text:
        _armed[:] = parse(text)


@contextlib.contextmanager
def injected(*faults: Fault) -> Iterator[None]:
    """A block in which these faults are armed, and no others."""
    before = list(_armed)
    _armed[:] = faults
    try:
        yield
    finally:
        _armed[:] = before


def _act(fault: Fault) -> None:
    message = f"injected at {fault.point}, passing {fault.passed}"
    os.write(_STDERR, f"fault: {fault.action} {message}, rank {os.environ.get('RANK', '0')}\n".encode())
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "raise":
            raise RuntimeError(message)
        case "full":
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({message})")
        case "memory":
            import torch

            raise torch.OutOfMemoryError(message)
        case "hang":
            while True:
                time.sleep(3600)
        case "slow":
            time.sleep(_SLOW_SECONDS)
