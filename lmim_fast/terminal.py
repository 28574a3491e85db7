"""What the command line prints: no control character of a file or a message reaches the terminal or a log.

Names, keys, labels and values come from files of other people, and go through errors, warnings, tables and
progress. They are made harmless where all of them pass: at standard output and standard error.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from lmim_fast.data.visible import visible, visible_lines

_PACKAGE = str(Path(__file__).parent)


class _Escaping:
    """A stream that writes control characters as escaped code points; line breaks and tabs stay."""

    def __init__(self, stream: TextIO):
        self.rich_proxied_file = stream  # rich's name for the stream below

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(visible_lines(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Print through streams that escape control characters and what the terminal's encoding lacks.

    Warnings are one line each meanwhile; a traceback that ends the process is escaped as well.
    """
    streams, form = (sys.stdout, sys.stderr), warnings.formatwarning
    errors = [getattr(stream, "errors", None) for stream in streams]
    sys.excepthook = _print_traceback
    try:
        _set_errors(streams, ["backslashreplace"] * 2)
        sys.stdout, sys.stderr = (_Escaping(stream) for stream in streams)
        warnings.formatwarning = _one_line
        yield
    finally:
        sys.stdout, sys.stderr = streams
        warnings.formatwarning = form
        _set_errors(streams, errors)


def _set_errors(streams: tuple[TextIO, TextIO], errors: list[str | None]) -> None:
    for stream, how in zip(streams, errors, strict=True):
        if how is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=how)


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as the command line prints it; those of other packages say where they come from."""
    text = visible(" ".join(str(message).split()))
    own = filename.startswith(_PACKAGE) or filename.startswith("<")
    return f"warning: {text}\n" if own else f"warning: {text} ({category.__name__}, {filename}:{lineno})\n"


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python prints what nobody caught, without control characters."""
    with guarded():
        traceback.print_exception(kind, error, trace)
