"""Reads of files that a source names, kept inside one folder."""

from __future__ import annotations

import errno
import functools
import os
import stat

from lmim_fast.data.importers.entries import Refused
from lmim_fast.data.visible import visible
from lmim_fast.errors import DataError, UsageError

MAX_FILE_BYTES = 2**26
"""Larger files are refused: no crop or page is, and a few of them per thread are in memory at a time."""
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff")
)
"""Files taken for images, in lower case; TIFF so that it is refused by name rather than passed over."""

# A pipe would wait for a writer without O_NONBLOCK; links are followed after a look at where they lead.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_CACHED_FOLDERS = 4096


class Root:
    """A folder whose files can be read by relative names, and nothing outside of it.

    Raises:
        UsageError: it is no folder.
    """

    def __init__(self, folder: str) -> None:
        if not os.path.isdir(folder):
            raise UsageError(f"{visible(folder)}: no such folder; give the one that paths are relative to")
        self.folder = os.path.realpath(folder)
        self._real_folder = functools.lru_cache(_CACHED_FOLDERS)(self._resolve)

    def read(self, name: str) -> bytes:
        """All bytes of a file.

        Raises:
            Refused:   the name leads out of the folder, or there is no readable regular file of usual size.
            DataError: the file is there, but reading fails (a disk or network error).
        """
        if not name:
            raise Refused("no path")
        if "\0" in name:
            raise Refused("NUL in the path", name)
        if name.startswith("/"):
            raise Refused("absolute path", name)
        if ".." in name.split("/"):
            raise Refused("path with ..", name)
        head, tail = os.path.split(name)
        try:
            handle = self._open(os.path.join(self._real_folder(head), tail), name)
            try:
                # Again, now that it is open: a folder on the way may have become a link since.
                if not self._holds(os.readlink(f"/proc/self/fd/{handle}")):
                    raise Refused("link out of the folder", name)
                return _content(handle, name)
            finally:
                os.close(handle)
        except UnicodeEncodeError as error:  # half of a surrogate pair, from JSON
            raise Refused("no such file", name) from error
        except OSError as error:
            raise _failure(error, name, self.folder) from error

    def _resolve(self, head: str) -> str:
        real = os.path.realpath(os.path.join(self.folder, head))
        if not self._holds(real):
            raise Refused("link out of the folder", head)
        return real

    def _open(self, path: str, name: str) -> int:
        try:
            return os.open(path, _FLAGS)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        real = os.path.realpath(path)
        if not self._holds(real):
            raise Refused("link out of the folder", name)
        return os.open(real, _FLAGS)

    def _holds(self, real: str) -> bool:
        return os.path.commonpath((self.folder, real)) == self.folder


def _content(handle: int, name: str) -> bytes:
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        raise Refused("not a regular file", name)
    if status.st_size > MAX_FILE_BYTES:
        raise Refused("file too large", f"{status.st_size} bytes")
    content = os.read(handle, status.st_size)
    while len(content) < status.st_size:  # rarely: a signal or a network file system cuts a read
        more = os.read(handle, status.st_size - len(content))
        if not more:
            break
        content += more
    return content


def _failure(error: OSError, name: str, folder: str) -> Exception:
    """A file that cannot be there is refused; a failing disk is no reason to leave records out."""
    if error.errno in _NOT_THERE:
        return Refused("no such file", name)
    if error.errno == errno.ELOOP:
        return Refused("link to itself", name)
    if error.errno in (errno.EACCES, errno.EPERM):
        return Refused("no permission", name)
    if error.errno == errno.ENXIO:  # a socket
        return Refused("not a regular file", name)
    path = visible(os.path.join(folder, name))
    return DataError(f"{path} cannot be read ({error.strerror}); mend that and run the command again")
