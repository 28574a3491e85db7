"""A folder of images, at any depth."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from lmim_fast.config.collections import ImportConfig
from lmim_fast.data.importers.entries import Entry, Item, Part, Refused, Reject, Skip, checked_label
from lmim_fast.data.importers.paths import SUFFIXES, Root
from lmim_fast.data.visible import visible
from lmim_fast.errors import DataError, UsageError

_DIGITS = re.compile(r"([0-9]+)")


class Folder(Part):
    """Images in the order of their names; a sub-folder stands where its name does.

    Links to files inside the folder are followed, links to folders are not: they could lead in a circle or to
    the same files twice. In memory are the names of one folder (and of those above it) at a time.
    """

    def __init__(self, path: str, config: ImportConfig) -> None:
        if os.path.exists(os.path.join(path, "data.mdb")):
            raise UsageError(f"{visible(path)} is an LMDB already; `lmim data merge` joins LMDBs")
        self.path = path
        self._root = Root(path)
        self._label_from = config.label_from
        self._key: Callable[[str], Any] = natural_key if config.sort == "natural" else str
        self._count = self._passed = 0

    def identity(self) -> dict[str, Any]:
        """Hash of all names of images; other files may come and go."""
        digest = hashlib.blake2b(digest_size=16)
        self._count = self.passed_over = 0
        for name, kind in self._walk():
            if kind is Skip:
                self.passed_over += 1
            else:
                self._count += 1
                digest.update(os.fsencode(name) + b"\0")
        return {"names": digest.hexdigest()}

    def entries(self, start: int) -> Iterator[Entry]:
        """An entry an image; see `Part.entries`."""
        self._passed = start
        for name, kind in islice((file for file in self._walk() if file[1] is not Skip), start, None):
            self._passed += 1
            yield self._entry(name, kind)

    def share(self) -> float:
        """See `Part.share`."""
        return self._passed / max(self._count, 1)

    def _entry(self, name: str, kind: type[Entry]) -> Entry:
        where = os.path.join(self.path, name)
        if kind is Reject:
            return Reject(where, "link to a folder")
        try:
            label = None if self._label_from == "none" else checked_label(self._label(name))
        except Refused as refused:
            return Reject(where, refused.reason, refused.detail)
        return Item(where, partial(self._root.read, name), label)

    def _label(self, name: str) -> str:
        head, tail = os.path.split(name)
        if self._label_from == "name":
            return os.path.splitext(tail)[0]
        return os.path.basename(head or self._root.folder)

    def _walk(self) -> Iterator[tuple[str, type[Entry]]]:
        """Relative names of all files in order, and which entry each is."""
        waiting = [iter(self._listing(""))]
        while waiting:
            for name, kind in waiting[-1]:
                if kind is None:
                    waiting.append(iter(self._listing(name)))
                    break
                yield name, kind
            else:
                waiting.pop()

    def _listing(self, name: str) -> list[tuple[str, type[Entry] | None]]:
        """Relative names in one folder in order, and which entry each is; None: a folder."""
        folder = os.path.join(self._root.folder, name)
        try:
            with os.scandir(folder) as children:
                kinds = [(child.name, _kind(child)) for child in children]
        except OSError as error:
            raise DataError(f"{visible(folder)} cannot be listed ({error.strerror})") from error
        kinds.sort(key=lambda child: self._key(child[0]))
        return [(os.path.join(name, child), kind) for child, kind in kinds]


def _kind(child: os.DirEntry[str]) -> type[Entry] | None:
    if child.is_dir(follow_symlinks=False):
        return None
    if child.is_symlink() and os.path.isdir(child.path):
        return Reject
    return Item if os.path.splitext(child.name)[1].lower() in SUFFIXES else Skip


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts runs of digits by their value; equal ones (1 and 01) by the name."""
    parts = _DIGITS.split(name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name
