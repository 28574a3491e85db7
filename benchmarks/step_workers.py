"""Processes that run variants: one for each, so that none sees another's caches, compiler or allocator."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.floors import Ceilings
from benchmarks.step_variants import Candidate, Prepared, Setting, prepare, synchronise
from lmim_fast.config import preset

STEPS = {"cuda": 5, "cpu": 1}  # of a turn; on CUDA they follow each other without a wait, as in training
_PRODUCTS = 3  # of a turn


class Request(NamedTuple):
    """What a process runs, and how."""

    variant: str
    setting: Setting
    tries: list[Candidate]
    search: bool


class VariantFailed(Exception):
    """The variant does not run here; the message says why."""


class Worker:
    """A process for one variant, which waits for orders.

    Raises:
        VariantFailed: (by every method) the process failed or is gone.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, target, arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def send(self, order: str) -> None:
        try:
            self._pipe.send(order)
        except OSError as error:
            raise VariantFailed("its process is gone") from error

    def receive(self) -> Any:
        """The answer to the oldest order that has none yet."""
        try:
            answer, failure = self._pipe.recv()
        except EOFError as error:
            self._process.join(30)
            raise VariantFailed(f"its process ended with {self._process.exitcode}") from error
        if failure is not None:
            raise VariantFailed(failure)
        return answer

    def ask(self, order: str) -> Any:
        """Send, and wait for the answer."""
        self.send(order)
        return self.receive()

    def end(self) -> None:
        """End the process, which has no order left."""
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Child process: `target` answers orders; what it raises is told."""
    try:
        target(pipe, *arguments)
    except EOFError:  # no more orders
        return
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        pipe.send((None, f"{type(error).__name__}: {lines[0][:300]}"))


def serve_steps(pipe: Connection, request: Request) -> None:
    """Orders: "prepare" (answer: chosen, searched), "turn" (milliseconds of a step), "memory" (peak bytes).

    On CUDA a turn starts with a step that does not count, since the last turn ended with memory given back:
    several variants share the device.
    """
    place = torch.device(request.setting.device)
    prepared: Prepared | None = None
    while True:
        order = pipe.recv()
        if order == "prepare":
            prepared = prepare(*request)
            _give_back(place)
            pipe.send(((prepared.chosen, prepared.searched), None))
        elif order == "turn":
            assert prepared is not None
            pipe.send((_turn(prepared.run, place), None))
        else:
            pipe.send((torch.cuda.max_memory_allocated(place), None))


def serve_products(pipe: Connection, size: int, dtype: torch.dtype) -> None:
    """Order "turn": FLOP/s of the CPU in square products."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    while True:
        pipe.recv()
        start = time.perf_counter()
        for _ in range(_PRODUCTS):
            torch.mm(a, b)
        pipe.send((_PRODUCTS * 2 * size**3 / (time.perf_counter() - start), None))


def _turn(run: Callable[[], None], place: torch.device) -> float:
    count = STEPS[place.type]
    if place.type == "cuda":
        run()
    synchronise(place)
    start = time.perf_counter()
    for _ in range(count):
        run()
    synchronise(place)
    milliseconds = (time.perf_counter() - start) * 1e3 / count
    _give_back(place)
    return milliseconds


def _give_back(place: torch.device) -> None:
    if place.type == "cuda":
        synchronise(place)
        torch.cuda.empty_cache()


def serve_memory(pipe: Connection, request: Request) -> None:
    """Order "memory" on a CPU: peak bytes of a step, weights and optimiser state included.

    The growth of the resident set after a tiny step (so without the libraries), with an allocator that gives
    freed tensors back at once (see `measure_memory`). What a compiler keeps for itself counts, what it takes
    for a while does not.
    """
    pipe.recv()
    variant, setting, tries, _ = request
    tiny = preset("tiny", decoder_dropout=setting.config.decoder_dropout, residual=setting.config.residual)
    prepare(variant, setting._replace(config=tiny), tries, False)
    gc.collect()
    before = _resident("VmRSS")
    prepared = prepare(variant, setting, tries, False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    prepared.run()
    pipe.send((_resident("VmHWM") - before, None))


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status: peak memory on a CPU is measured on Linux only")


def measure_memory(request: Request) -> int:
    """Peak bytes of a step on a CPU, in a process of its own.

    Raises:
        VariantFailed: the step fails.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(256 * 1024)  # read by glibc when the child starts
    try:
        worker = Worker(serve_memory, request)
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    peak: int = worker.ask("memory")
    worker.end()
    return peak


def serve_parts(pipe: Connection, variant: str, setting: Setting, ceilings: Ceilings | None) -> None:
    """Order "parts": the rows of `step_parts.measure_parts`."""
    from benchmarks.step_parts import measure_parts

    pipe.recv()
    pipe.send((measure_parts(variant, setting, ceilings), None))
