"""Output files of `lmim data`: whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

from lmim_fast import durable
from lmim_fast.errors import UsageError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all; its folder is made.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_file(path, content)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror})") from error


def require_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before time is spent on what goes into it.

    Raises:
        UsageError: its folder does not exist or takes no files, or it is a folder itself.
    """
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise UsageError(f"--output {path}: is a folder; name a file in it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--output {path}: no permission to write in {path.parent}")


def require_new(folder: Path, names: tuple[str, ...]) -> None:
    """Refuse a folder that cannot take the files, before hours are spent on what goes into them.

    Raises:
        UsageError: one of the files exists, or the folder cannot be made or written.
    """
    for name in names:
        if os.path.lexists(folder / name):
            raise UsageError(f"{folder / name} exists; remove it or choose another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--output {folder}: no permission to write there")
