"""Processes that begin at once: forks of one that has imported the trainer and has run nothing.

A fresh Python takes six seconds of a core for these imports. A fork has its own memory, threads and signals,
so what is killed, hangs or fails in it does so as in any other process.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from pretrain_runs import ENVIRONMENT
from torch.distributed import TCPStore

from lmim_fast.faults import VARIABLE

_IMPORTED = [
    *("pytest", "tyro", "torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard"),
    *("lmim_fast.cli", "lmim_fast.train.run", "lmim_fast.train.watchdog"),
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTED)


def process(function: Callable[..., object], *arguments: object) -> ForkServerProcess:
    """A process, not yet started, whose Python is warm."""
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", OMP_WAIT_POLICY="passive")
    try:
        ensure_running()  # torch reads the number of threads when it is imported: of the server, once
    finally:
        os.environ.clear()
        os.environ.update(before)
    return _context.Process(target=function, args=arguments)


class Program:
    """A function, or a command of `lmim`, as a program: with an environment, an output and an exit code.

    Args:
        main:        called with `arguments`; what it returns is the exit code.
        environment: beside this process's.
        session:     whether it has a session, and so a group of processes, of its own.
    """

    def __init__(
        self,
        main: Callable[..., int | None],
        *arguments: object,
        environment: dict[str, str] | None = None,
        session: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("out", "err")]
        settings = {**ENVIRONMENT, **(environment or {})}
        self.process = process(_run, main, arguments, settings, self._outputs, session)
        self.process.start()
        self.pid: int = self.process.pid  # type: ignore[assignment]

    @property
    def out(self) -> str:
        """Standard output so far."""
        return self._read(0)

    @property
    def err(self) -> str:
        """Standard error so far."""
        return self._read(1)

    def _read(self, number: int) -> str:
        path = self._outputs[number]
        return path.read_text() if path.exists() else ""

    def wait(self, limit: float = 120) -> subprocess.CompletedProcess[str]:
        """Exit code and output at its end; after so many seconds it is killed and that is an error."""
        self.process.join(limit)
        late = self.process.is_alive()
        if late:
            self.process.kill()
            self.process.join()
        done = subprocess.CompletedProcess([], self.process.exitcode, self.out, self.err)  # type: ignore[arg-type]
        self._folder.cleanup()
        assert not late, f"still running after {limit:g} s:\n{done.stdout}\n{done.stderr}"
        return done

    def wait_for(self, wanted: str, limit: float = 60) -> None:
        """Wait until the output holds this text; fails if the program ends before."""
        until = time.monotonic() + limit
        while wanted not in self.out + self.err:
            ended = not self.process.is_alive() or time.monotonic() > until
            assert not ended or wanted in self.out + self.err, f"no {wanted!r}:\n{self.out}\n{self.err}"
            time.sleep(0.01)


def _run(
    main: Callable[..., int | None],
    arguments: Sequence[object],
    environment: dict[str, str],
    outputs: Sequence[Path],
    session: bool,
) -> None:
    if session:
        os.setsid()
    for number, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(main(*arguments))


def _lmim(arguments: Sequence[str]) -> int:
    from lmim_fast import cli

    return cli.main(arguments)


def lmim(arguments: Sequence[str], *, faults: str = "", **more: Any) -> Program:
    """A started command of `lmim`."""
    return Program(_lmim, arguments, environment={VARIABLE: faults}, **more)


class Ranks:
    """Processes that train together, started as torchrun starts them, though not by it.

    Args:
        main:      called by each with `arguments`; what it returns is the exit code.
        size:      processes.
        faults:    what LMIM_FAST_FAULTS says.
    """

    def __init__(
        self, main: Callable[..., int | None], *arguments: object, size: int = 2, faults: str = ""
    ) -> None:
        # The store is the parent's, as under torchrun: a port that is only found may be taken meanwhile.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks = [
            Program(main, *arguments, environment={VARIABLE: faults, **place(rank, size, self._store.port)})
            for rank in range(size)
        ]

    def wait(self, limit: float = 120) -> list[subprocess.CompletedProcess[str]]:
        """Exit code and output of each at their end."""
        try:
            return [rank.wait(limit) for rank in self.ranks]
        finally:
            for rank in self.ranks:
                rank.process.kill()
                rank.process.join()


def place(rank: int, size: int, port: int) -> dict[str, str]:
    """Variables by which a process knows its place in a group on this machine."""
    numbers = dict(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size, MASTER_PORT=port)
    named = {name: str(number) for name, number in numbers.items()}
    return {**named, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def lmim_ranks(arguments: Sequence[str], **more: Any) -> Ranks:
    """A started command of `lmim` in processes that train together."""
    return Ranks(_lmim, arguments, **more)


def finish(arguments: Sequence[str], **more: Any) -> list[subprocess.CompletedProcess[str]]:
    """A command of `lmim` in processes that train together, to its end without a failure."""
    done = lmim_ranks(arguments, **more).wait()
    assert [rank.returncode for rank in done] == [0] * len(done), "\n".join(rank.stderr for rank in done)
    return done
