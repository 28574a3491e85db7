"""Files that are whole or absent, and last through a power cut where the file system can promise it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# How file systems say that they cannot flush: CIFS, 9p, VirtualBox and FUSE mounts of folders, some FUSE
# mounts of files too. EIO is not among them: a disk that fails says it, and what it holds is then not safe.
_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.ENOTTY}
# How they say that a folder cannot even be opened to be flushed, though names can be made in it.
_CANNOT_OPEN = _CANNOT_FLUSH | {errno.EACCES, errno.EPERM, errno.EISDIR}
_told: set[int] = set()  # file systems that the user was warned of, by device number


def flush_folder(path: Path) -> None:
    """Make the names in a folder (new files, renames) last through a power cut, or warn that they may not.

    Raises:
        OSError: the disk failed.
    """
    reason = refusal(path)
    if reason is not None:
        _warn(os.stat(path).st_dev, path, "names of new files", reason)


def refusal(path: Path) -> str | None:
    """Flush a folder; the reason if its file system cannot do that, None if it did.

    Raises:
        OSError: the disk failed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in _CANNOT_OPEN:
            raise
        return os.strerror(error.errno)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
        return os.strerror(error.errno)
    finally:
        os.close(descriptor)
    return None


def flush_file(descriptor: int, path: Path) -> None:
    """Bring an open file's content onto the disk, or warn that its file system cannot promise it.

    Raises:
        OSError: the disk is full or failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
        _warn(os.fstat(descriptor).st_dev, path, "new files", os.strerror(error.errno))


def flush_named(path: Path) -> None:
    """`flush_file` of a closed file, which another library has written.

    Raises:
        OSError: as of `flush_file`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        flush_file(descriptor, path)
    finally:
        os.close(descriptor)


def _warn(device: int, path: Path, what: str, reason: str) -> None:
    # Not left to Python's own rule of once a place: any library that changes the filters makes it forget.
    if device in _told:
        return
    _told.add(device)
    warnings.warn(
        f"the file system of {os.path.abspath(path)} cannot flush ({reason}): {what} may be lost in a power "
        "cut or a crash of the server; all else works, and a kill of the process loses nothing",
        stacklevel=1,
    )


def temporary_name(path: Path) -> Path:
    """Where a file or folder is made before it gets the name `path`."""
    return path.with_name(path.name + ".tmp")


def create(path: Path) -> BinaryIO:
    """A new file to write; what had its name is removed first, and a link there is never followed.

    Raises:
        OSError: it cannot be made, or a folder has its name.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it; of a link only the link.

    Raises:
        OSError: something could not be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A block that writes a new file, which gets the name `path` at its end; if it fails nothing is left.

    An older file of that name is replaced as a whole; so is a link, whose target stays as it is.

    Raises:
        OSError: the disk is full, the path cannot be written, or another process writes it at the same time.
    """
    temporary = temporary_name(path)
    with create(temporary) as file:
        try:
            yield file
            file.flush()
            flush_file(file.fileno(), path)
            _require_ours(file, temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                _require_ours(file, temporary)
                temporary.unlink()
            raise
    flush_folder(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent.

    Raises:
        OSError: as of `writing`.
    """
    with writing(path) as file:
        file.write(content)


def _require_ours(file: BinaryIO, temporary: Path) -> None:
    if not os.path.samestat(os.fstat(file.fileno()), os.lstat(temporary)):
        raise FileExistsError(errno.EEXIST, "another process writes it at the same time", str(temporary))


def free_bytes(path: Path) -> int | None:
    """Bytes that are free where `path` is; None if the file system does not say (FUSE may tell 0 of 0)."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return usage.free if usage.total else None
