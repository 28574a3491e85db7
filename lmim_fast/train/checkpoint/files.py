"""Files that are whole or absent, and reads that are checked against a size and a checksum."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

from lmim_fast.errors import CheckpointError, LmimError


def explain(error: OSError, path: Path) -> LmimError:
    """What a failed write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LmimError(f"disk full while writing {path}: free some space and run the same command again")
    return LmimError(f"cannot write {path}: {error.strerror or error}")


def write_flushed(path: Path, content: bytes) -> dict[str, Any]:
    """Write one file through to the disk; its line of a manifest."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def flush_folder(path: Path) -> None:
    """Make the names in a folder (new files, renames) last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file so that it is whole or absent; its line of a manifest.

    Raises:
        LmimError: the disk is full or the path cannot be written; an older file of that name is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        line = write_flushed(temporary, content)
        temporary.rename(path)
        flush_folder(path.parent)
    except OSError as error:
        _discard(temporary)
        raise explain(error, path) from error
    return line


def _discard(path: Path) -> None:
    if path.is_file():
        path.unlink()


def read_checked(path: Path, line: dict[str, Any]) -> bytes:
    """A file's bytes, which are the ones its manifest line was made of.

    Raises:
        CheckpointError: it is missing, truncated or altered.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if len(content) != line["bytes"]:
        raise CheckpointError(f"{path} has {len(content)} bytes, its manifest says {line['bytes']}")
    if hashlib.sha256(content).hexdigest() != line["sha256"]:
        raise CheckpointError(f"{path} was altered: its checksum is not the manifest's")
    return content
