"""Which process is meant, and whether it is alive: told by its number and the moment at which it began."""

from __future__ import annotations

import datetime
import functools
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_COMMAND_LENGTH = 120  # characters of a command line that are told

State = Literal["runs", "stopped", "ended", "unknown"]


@dataclass(frozen=True)
class Process:
    """A process, so that others of its machine can tell whether it is alive."""

    host: str
    boot: str
    """Id of the machine's start."""
    namespace: str
    """Of process numbers: a container has its own."""
    pid: int
    started: int
    """Clock ticks from the machine's start: a number is given to another process again."""
    since: str
    command: str

    @classmethod
    def this(cls) -> Process:
        """This process."""
        boot, namespace = _machine()
        try:
            started = _stat(os.getpid())[2]
        except OSError:  # without /proc nobody can look: others wait for signs of life
            boot, started = "", 0
        since = datetime.datetime.now().astimezone().isoformat(" ", timespec="seconds")
        name, *arguments = sys.argv or [""]
        folder, name = os.path.split(name)
        command = " ".join([os.path.basename(folder) if name == "__main__.py" else name, *arguments])
        return cls(socket.gethostname(), boot, namespace, os.getpid(), started, since, command)

    @classmethod
    def read(cls, text: bytes) -> Process | None:
        """The process that an owner's file names; None if it is unfinished or damaged."""
        try:
            fields: dict[str, Any] = json.loads(text)
            told = cls(**{name: fields[name] for name in cls.__dataclass_fields__})
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        texts = all(isinstance(getattr(told, name), str) for name in ("host", "boot", "since", "command"))
        known = texts and isinstance(told.pid, int) and 0 < told.pid < 2**31
        return told if known else None

    def state(self) -> State:
        """What this machine says of the process; unknown: it is of another machine, or hidden."""
        if not self.boot or (self.boot, self.namespace) != _machine():
            return "unknown"
        try:
            state, threads, started = _stat(self.pid)
        except OSError:
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return "ended"
            except OSError:
                pass
            return "unknown"  # another user's, and /proc hides those
        if started != self.started or (state in "ZX" and threads <= 1):
            return "ended"
        return "stopped" if state in "Tt" else "runs"

    def __str__(self) -> str:
        command = "".join(character if character.isprintable() else "?" for character in self.command)
        if len(command) > _COMMAND_LENGTH:
            command = command[:_COMMAND_LENGTH] + "..."
        return f"process {self.pid} on {self.host} (since {self.since}: {command})"


@functools.cache
def _machine() -> tuple[str, str]:
    """Id of this machine's start, empty where there is none, and of the namespace of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _stat(pid: int) -> tuple[str, int, int]:
    """State, number of threads and start of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[17]), int(fields[19])
