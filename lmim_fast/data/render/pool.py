"""Rendering in several processes, a bounded number of crops ahead of the reader.

The processes are spawned: nothing is forked from a process with threads. They do not import the caller's main
module, so a script needs no `if __name__ == "__main__"` and may come from standard input.

Records pass through files of a temporary folder, and only their paths through the executor's pipe: a process
that is killed while it sends a long message leaves half of it there, and the executor waits for the rest.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import types
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2

from lmim_fast.data.render.crop import Recipe
from lmim_fast.errors import LmimError

Record = tuple[str, bytes]

CHUNK = 32  # crops of one task: ~0.1 s and 160 KB
_CHUNKS_AHEAD = 4  # tasks in flight per process: enough to go on while the reader commits to disk
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}  # of the workers

_render: Callable[[int], Record]  # of a worker, from a crop's index; set by _start_worker
_folder: Path  # of a worker, for its records


def render_records(recipe: Recipe, indices: range, processes: int) -> Generator[Record, None, None]:
    """Labels and encoded images of the crops `indices`, in order, equal for any number of processes.

    Closing the iterator ends the processes.

    Raises:
        LmimError: a process cannot be started, died, or could not read a font.
    """
    processes = min(processes, -(-len(indices) // CHUNK))
    if processes <= 1:
        yield from map(recipe.crop, indices)
        return
    try:
        with tempfile.TemporaryDirectory(prefix="lmim-render-", ignore_cleanup_errors=True) as folder:
            yield from _render_in_processes(recipe, indices, processes, Path(folder))
    except BrokenProcessPool as error:
        raise LmimError("a rendering process died: it crashed or was killed (out of memory?)") from error
    except OSError as error:
        raise LmimError(f"rendering in {processes} processes failed: {error}") from error


def _render_in_processes(
    recipe: Recipe, indices: range, processes: int, folder: Path
) -> Generator[Record, None, None]:
    initial = recipe.save_words(folder), folder
    with _inherited_environment():  # for the resource tracker, a process that comes with the queues
        executor = ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), _start_worker, initargs=initial
        )
    # A thread starts the processes: Ctrl-C is raised in the main thread and interrupts no start. The thread
    # blocks the signal, and the processes inherit that: they wait for this one to end them.
    block = (signal.SIG_BLOCK, {signal.SIGINT})
    with ThreadPoolExecutor(1, "lmim-start", signal.pthread_sigmask, block) as starter:
        pending: deque[Future[Future[Path]]] = deque()
        try:
            for start in range(0, len(indices), CHUNK):
                if len(pending) == _CHUNKS_AHEAD * processes:
                    yield from _read(pending.popleft().result().result())
                pending.append(starter.submit(_submit, executor, indices[start : start + CHUNK]))
            while pending:
                yield from _read(pending.popleft().result().result())
        finally:
            starter.shutdown(cancel_futures=True)
            executor.shutdown(cancel_futures=True)


def _submit(executor: ProcessPoolExecutor, indices: range) -> Future[Path]:
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


def _read(path: Path) -> list[Record]:
    records = pickle.loads(path.read_bytes())
    path.unlink()
    return records


def _start_worker(recipe: Recipe, folder: Path) -> None:
    global _render, _folder
    os.setsid()  # the terminal's other signals, such as its closing, also go to the parent alone
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    cv2.setNumThreads(1)
    _render, _folder = recipe.with_words(folder).crop, folder


def _end_with_parent(folder: Path) -> None:
    """End this worker if its parent is killed: its queue would never end, for it has both ends open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # The first worker removes the folder, under a name that none writes to.
    with contextlib.suppress(OSError):
        shutil.rmtree(folder.rename(folder.with_suffix(".old")))
    os._exit(1)


def _render_chunk(indices: range) -> Path:
    path = _folder / str(indices.start)
    path.write_bytes(pickle.dumps([_render(index) for index in indices]))
    return path
