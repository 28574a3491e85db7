"""Rendering in several processes, a bounded number of crops ahead of the reader.

The processes are spawned: nothing is forked from a process with threads. They do not import the caller's main
module, so a script needs no `if __name__ == "__main__"` and may come from standard input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import cv2

from lmim_fast.data.render.crop import render_crop
from lmim_fast.data.render.words import Vocabulary
from lmim_fast.errors import LmimError

Record = tuple[str, bytes]

CHUNK = 8  # crops of one task: ~20 ms; their ~40 KB fit the pipe, so a killed worker leaves no half message
_CHUNKS_AHEAD = 8  # tasks in flight per process: enough to go on while the reader commits to disk
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}  # of the workers

_render: Callable[[int], Record]  # a worker's renderer of a crop index, set by _start_worker


def render_records(
    vocabulary: Vocabulary, seed: int, count: int, processes: int
) -> Generator[Record, None, None]:
    """Labels and encoded images of crops 0 .. count-1, in order, equal for any number of processes.

    Closing the iterator ends the processes.

    Raises:
        LmimError: a process cannot be started, died, or could not read a font.
    """
    processes = min(processes, -(-count // CHUNK))
    if processes == 1:
        for index in range(count):
            yield render_crop(vocabulary, seed, index)
        return
    try:
        yield from _render_in_processes(vocabulary, seed, count, processes)
    except BrokenProcessPool as error:
        raise LmimError("a rendering process died: it crashed or was killed (out of memory?)") from error
    except OSError as error:
        raise LmimError(f"rendering in {processes} processes failed: {error}") from error


def _render_in_processes(
    vocabulary: Vocabulary, seed: int, count: int, processes: int
) -> Generator[Record, None, None]:
    executor = _make_executor(vocabulary, seed, processes)
    # A thread starts the processes: Ctrl-C is raised in the main thread and interrupts no start. The thread
    # blocks the signal, and the processes inherit that: they wait for this one to end them.
    block = (signal.SIG_BLOCK, {signal.SIGINT})
    with ThreadPoolExecutor(1, "lmim-start", signal.pthread_sigmask, block) as starter:
        pending: deque[Future[Future[list[Record]]]] = deque()
        try:
            for start in range(0, count, CHUNK):
                if len(pending) == _CHUNKS_AHEAD * processes:
                    yield from pending.popleft().result().result()
                pending.append(starter.submit(_submit, executor, range(start, min(start + CHUNK, count))))
            while pending:
                yield from pending.popleft().result().result()
        finally:
            starter.shutdown(cancel_futures=True)
            executor.shutdown(cancel_futures=True)


def _make_executor(vocabulary: Vocabulary, seed: int, processes: int) -> ProcessPoolExecutor:
    initial = dataclasses.replace(vocabulary), seed  # a copy: a vocabulary's caches cannot be pickled
    with _inherited_environment():  # for the resource tracker, a process that comes with the queues
        return ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), _start_worker, initargs=initial
        )


def _submit(executor: ProcessPoolExecutor, indices: range) -> Future[list[Record]]:
    with _inherited_environment():  # `submit` starts a process if none is idle
        return executor.submit(_render_chunk, indices)


@contextlib.contextmanager
def _inherited_environment() -> Iterator[None]:
    """Set what a process that is started here sees.

    BLAS starts one thread, not one per core. Python does not look for modules in the working directory. The
    main module is an empty one, so that spawn does not import the caller's again.
    """
    main = sys.modules["__main__"]
    environment = {name: os.environ.get(name) for name in _ENVIRONMENT}
    try:
        sys.modules["__main__"] = types.ModuleType("__main__")
        os.environ.update(_ENVIRONMENT)
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker(vocabulary: Vocabulary, seed: int) -> None:
    global _render
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    _render = partial(render_crop, vocabulary, seed)


def _end_with_parent() -> None:
    """End this worker if its parent is killed: its queue would never end, for it has both ends open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _render_chunk(indices: range) -> list[Record]:
    return [_render(index) for index in indices]
