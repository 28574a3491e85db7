"""Silence for libraries that write to standard error by themselves."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def decoders_silenced() -> Iterator[None]:
    """Drop what decoders write to file descriptor 2: lines without a record's name for each damaged image.

    Python's own messages still come out.
    """
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, io.UnsupportedOperation):  # replaced by something in memory
        descriptor = -1
    if descriptor != 2:
        yield
        return
    sys.stderr.flush()
    with (
        open(os.dup(2), "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1) as python,
        open(os.devnull, "wb") as nowhere,
        contextlib.redirect_stderr(python),
    ):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            python.flush()
            os.dup2(python.fileno(), 2)
