"""Rendering in several processes: each renders every P-th chunk and sends its records through a pipe.

Plain child processes (`python -m lmim_fast.data.render.pool`), not `multiprocessing`: the caller's main
module is not imported again, nothing is forked from a process with threads, and a child whose parent is gone
ends at its next write.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import IO

import cv2

from lmim_fast.data.render.crop import render_crop
from lmim_fast.data.render.words import Vocabulary
from lmim_fast.errors import LmimError

CHUNK = (
    32  # crops a process renders in a row: ~0.1 s, and small against the pipe of 64 KiB plus what waits in it
)
_SIZES = struct.Struct("<II")  # bytes of the label, bytes of the image


def render_records(
    vocabulary: Vocabulary, seed: int, count: int, processes: int
) -> Generator[tuple[str, bytes], None, None]:
    """Labels and encoded images of crops 0 .. count-1, in order, equal for any number of processes.

    Closing the iterator ends the child processes.

    Raises:
        LmimError: a child process died.
    """
    processes = min(processes, -(-count // CHUNK))
    if processes == 1:
        for index in range(count):
            yield render_crop(vocabulary, seed, index)
        return
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(_Child(vocabulary, seed, count, first, processes))
            for first in range(processes)
        ]
        for index in range(count):
            yield children[index // CHUNK % processes].read()


class _Child:
    """One rendering process: renders the chunks first, first + processes, ..."""

    def __init__(self, vocabulary: Vocabulary, seed: int, count: int, first: int, processes: int) -> None:
        self._job = json.dumps(
            dict(vocabulary=vocabulary.to_json(), seed=seed, count=count, first=first, processes=processes)
        )

    def __enter__(self) -> _Child:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        try:
            self._errors: IO[bytes] = tempfile.TemporaryFile()
            with tempfile.TemporaryFile() as job:  # not a pipe: nothing to wait for while the child starts
                job.write(self._job.encode())
                job.seek(0)
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "lmim_fast.data.render.pool"],
                    stdin=job,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    pipesize=2**20,  # a few chunks, so that a child seldom waits for its turn
                    env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends its children
                )
        except OSError as error:
            raise LmimError(f"cannot start a rendering process: {error}") from error
        return self

    def read(self) -> tuple[str, bytes]:
        """The next record."""
        label_size, image_size = _SIZES.unpack(self._read(_SIZES.size))
        return self._read(label_size).decode(), self._read(image_size)

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) == size:
            return data
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise LmimError(f"a rendering process ended early ({cause}): {lines[-1] if lines else 'no message'}")

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it owns nothing that needs an orderly end
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()


def _main() -> None:
    """Render what the job on standard input asks for, and write it to standard output."""
    job = json.load(sys.stdin)
    output = os.fdopen(os.dup(1), "wb", buffering=2**20)
    os.dup2(2, 1)  # a library that prints must not end up between the records
    cv2.setNumThreads(1)
    vocabulary = Vocabulary.from_json(job["vocabulary"])
    try:
        for start in range(job["first"] * CHUNK, job["count"], job["processes"] * CHUNK):
            for index in range(start, min(start + CHUNK, job["count"])):
                label, image = render_crop(vocabulary, job["seed"], index)
                text = label.encode()
                output.write(_SIZES.pack(len(text), len(image)) + text + image)
            output.flush()
        output.close()
    except BrokenPipeError:
        os._exit(0)  # the parent has gone; there is nobody to tell, and a flush at exit would fail again


if __name__ == "__main__":
    _main()
