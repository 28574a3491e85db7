"""Tar archives, also compressed and in WebDataset's layout, read from front to end; nothing is unpacked."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

from lmim_fast.config.collections import ImportConfig
from lmim_fast.data.importers.entries import Entry, Item, Part, Refused, Reject, Skip, checked_label
from lmim_fast.data.importers.paths import MAX_FILE_BYTES, SUFFIXES
from lmim_fast.data.visible import visible
from lmim_fast.errors import DataError, UsageError

_TEXTS = (".txt", ".json")
_LABEL_KEYS = ("label", "text")
_END_BYTES = 2**20  # at both ends of an archive, hashed
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by first bytes
_DAMAGE = (
    tarfile.TarError,
    EOFError,
    OverflowError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    ValueError,
)


class Tar(Part):
    """An image and its label are members next to each other that differ in the suffix only: `a/1.jpg`,
    `a/1.txt` or `a/1.json` with a `label` or `text`. Images without such a member have no label.

    Names of members are names: nothing is written to them, so they may be any.
    """

    def __init__(self, path: str, config: ImportConfig) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UsageError(f"{visible(path)} cannot be read ({error.strerror})") from error
        self._file: IO[bytes] | None = None

    def identity(self) -> dict[str, Any]:
        """Size, and hash of both ends."""
        digest = hashlib.blake2b(digest_size=16)
        with open(self.path, "rb") as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(0, self._size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
        return {"size": self._size, "ends": digest.hexdigest()}

    def share(self) -> float:
        """See `Part.share`."""
        return 0.0 if self._file is None else self._file.tell() / max(self._size, 1)

    def entries(self, start: int) -> Iterator[Entry]:
        """An entry a sample, and one for whatever cannot be one; see `Part.entries`.

        An archive that is damaged ends with a Reject: what stands behind the damage is lost.
        """
        number = 0  # of the next entry
        group: _Group | None = None
        with open(self.path, "rb") as self._file:
            members = _Members(_opened(self._file))
            try:
                while (member := members.next()) is not None:
                    key, suffix = os.path.splitext(member.name)
                    if group is not None and key != group.key:
                        yield from group.entries(self.path, max(0, start - number))
                        number, group = number + len(group), None
                    group = group or _Group(key)
                    alone = self._alone(member, suffix.lower())
                    if alone is not None:
                        group.beside.append(alone)
                    else:  # of what was imported before, no content is needed
                        group.add(suffix.lower(), members.read(member) if number >= start else b"")
                damage = members.damage()
            except _DAMAGE as error:
                damage = str(error) or type(error).__name__
            except OSError as error:
                if error.errno is not None:
                    raise DataError(f"{visible(self.path)} cannot be read ({error.strerror})") from error
                damage = str(error)  # bz2 and gzip say so that data is damaged
        self._file = None
        if damage:  # the last sample may lack members, so it is left out
            if number >= start:
                yield Reject(self.path, "damaged archive, its rest is lost", damage)
        elif group is not None:
            yield from group.entries(self.path, max(0, start - number))

    def _alone(self, member: tarfile.TarInfo, suffix: str) -> Entry | None:
        """The entry of a member that belongs to no sample; None: it does."""
        if member.isdir() or (member.isreg() and suffix not in SUFFIXES and suffix not in _TEXTS):
            return Skip()
        where = f"{self.path}: {member.name}"
        if not member.isreg() or member.issparse():
            return Reject(where, "not a regular file")
        if member.size > MAX_FILE_BYTES:
            return Reject(where, "file too large", f"{member.size} bytes")
        return None


class _Group:
    """The members of one sample."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.beside: list[Entry] = []
        """Entries of members with this key that belong to no sample."""
        self._files: dict[str, bytes] = {}
        self._twice = ""

    def add(self, suffix: str, content: bytes) -> None:
        if suffix in self._files or (suffix in SUFFIXES and not SUFFIXES.isdisjoint(self._files)):
            self._twice = suffix
        else:
            self._files[suffix] = content

    def __len__(self) -> int:
        return bool(self._files) + len(self.beside)

    def entries(self, path: str, start: int) -> list[Entry]:
        """The sample, then what is beside it; from number `start` on."""
        if start >= len(self):
            return []
        sample = [self._entry(path)] if self._files and start == 0 else []
        return [*sample, *self.beside[max(0, start - bool(self._files)) :]]

    def _entry(self, path: str) -> Entry:
        where = f"{path}: {self.key}"
        images = [(suffix, content) for suffix, content in self._files.items() if suffix in SUFFIXES]
        if self._twice:
            return Reject(where, "two members for one place", self.key + self._twice)
        if not images:
            return Reject(where, "label without an image")
        ((suffix, image),) = images
        try:
            label = self._label()
        except Refused as refused:
            return Reject(where, refused.reason, refused.detail)
        return Item(where + suffix, partial(bytes, image), label, size=len(image))

    def _label(self) -> str | None:
        if ".txt" in self._files:
            return checked_label(_decoded(self._files[".txt"]).rstrip("\r\n"))
        if ".json" not in self._files:
            return None
        try:
            value = json.loads(_decoded(self._files[".json"]))
        except (ValueError, RecursionError) as error:
            raise Refused("not JSON", str(error).partition(":")[0]) from error
        if not isinstance(value, dict):
            raise Refused("not a JSON object", type(value).__name__)
        found = [value[key] for key in _LABEL_KEYS if key in value]
        return checked_label(found[0]) if found else None


class _Members:
    """The members of a tar stream in turn, the memory of passed ones freed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._headers = stream, _Headers(stream)
        self._tar: tarfile.TarFile | None = None

    def next(self) -> tarfile.TarInfo | None:
        if self._tar is None:
            self._tar = tarfile.TarFile(fileobj=self._headers)  # type: ignore[arg-type]
        member = self._tar.next()
        self._tar.members.clear()  # type: ignore[attr-defined]
        return member

    def read(self, member: tarfile.TarInfo) -> bytes:
        self._stream.seek(member.offset_data)
        content = self._stream.read(member.size)
        if len(content) < member.size:
            raise tarfile.ReadError(f"{member.name} ends early")
        return content

    def damage(self) -> str:
        """What is wrong where the members end; "" for the block of zeros that ends an archive.

        `TarFile` takes an unreadable header for the end.
        """
        if len(self._headers.last) < tarfile.BLOCKSIZE:
            return "it ends without the mark of an end"
        return "a header cannot be read" if any(self._headers.last) else ""


class _Headers:
    """What `TarFile` reads headers from: none is larger than a file may be."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""
        self.tell, self.seek = stream.tell, stream.seek
        self.name, self.mode = None, "rb"

    def read(self, size: int) -> bytes:
        if size > MAX_FILE_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self._stream.read(size)
        return self.last


def _opened(file: IO[bytes]) -> IO[bytes]:
    """The archive's bytes, decompressed where they are compressed."""
    beginning = file.read(8)
    file.seek(0)
    for magic, opener in _OPENERS.items():
        if beginning.startswith(magic):
            return opener(file, "rb")  # type: ignore[operator]
    return file


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("not UTF-8") from error


def is_tar(path: str) -> bool:
    """Whether a file's name is one of an archive."""
    name = path.lower()
    return name.endswith((".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz"))
