"""Text files with one record a line, read with bounds; and the plain list of path and label."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from lmim_fast.config.collections import ImportConfig
from lmim_fast.data.importers.entries import Entry, Item, Part, Refused, Reject, checked_label
from lmim_fast.data.importers.paths import Root
from lmim_fast.data.visible import visible
from lmim_fast.errors import DataError, UsageError

MAX_LINE_BYTES = 2**24
"""Longer lines are refused: a page's boxes take a few KB."""
SEPARATORS = {"tab": "\t", "space": " ", "comma": ",", "semicolon": ";"}


class Line(NamedTuple):
    """A line without its end; text is None, and reason says why, where it cannot be used."""

    number: int
    text: str | None
    reason: str = ""


class ListPart(Part):
    """A list whose paths are relative to `root`, or to its own folder."""

    def __init__(self, path: str, config: ImportConfig) -> None:
        self.path = path
        self._root = Root(os.path.dirname(os.path.abspath(path)) if config.root is None else config.root)
        try:
            with open(path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UsageError(f"{visible(path)} cannot be read ({error.strerror})") from error
        self._passed = 0  # bytes

    def identity(self) -> dict[str, Any]:
        """Hash of the list; the root's name does not matter, as long as its files are the same."""
        with open(self.path, "rb") as file:
            return {"hash": hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()}

    def entries(self, start: int) -> Iterator[Entry]:
        """See `Part.entries`."""
        yield from islice(self._all_entries(), start, None)

    def share(self) -> float:
        """See `Part.share`."""
        return self._passed / max(self._size, 1)

    def lines(self) -> Iterator[Line]:
        """All lines but empty ones.

        Raises:
            DataError: the file cannot be read any more.
        """
        self._passed = 0
        try:
            with open(self.path, "rb") as file:
                yield from self._lines(file)
        except OSError as error:
            raise DataError(f"{visible(self.path)} cannot be read ({error.strerror})") from error

    def _lines(self, file: Any) -> Iterator[Line]:
        number = 0
        while data := file.readline(MAX_LINE_BYTES):
            number += 1
            self._passed += len(data)
            if len(data) == MAX_LINE_BYTES and not data.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    self._passed += len(rest)
                self._passed += len(rest)
                yield Line(number, None, "line too long")
                continue
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            data = data.rstrip(b"\r\n")
            if not data:
                continue
            try:
                yield Line(number, data.decode())
            except UnicodeDecodeError:
                yield Line(number, None, "not UTF-8")

    def item(self, where: str, name: object, label: object) -> Entry:
        """The entry of a path and a label (None: no label), if both can be used."""
        try:
            if not isinstance(name, str):
                raise Refused("path is not text", type(name).__name__)
            text = None if label is None else checked_label(label)
        except Refused as refused:
            return Reject(where, refused.reason, refused.detail)
        return Item(f"{where}: {name}", partial(self._root.read, name), text)

    def where(self, number: int) -> str:
        """A line for people."""
        return f"{self.path}:{number}"

    @abstractmethod
    def _all_entries(self) -> Iterator[Entry]:
        """All entries of the list."""


class Tsv(ListPart):
    """Lines `path<TAB>label`, or with another separator: the label is the rest of the line."""

    def __init__(self, path: str, config: ImportConfig) -> None:
        super().__init__(path, config)
        self._separator = config.separator or "tab"

    def _all_entries(self) -> Iterator[Entry]:
        for line in self.lines():
            where = self.where(line.number)
            if line.text is None:
                yield Reject(where, line.reason)
                continue
            name, separator, label = line.text.partition(SEPARATORS[self._separator])
            if separator:
                yield self.item(where, name, label)
            else:
                yield Reject(where, f"no {self._separator} in the line", line.text[:200])
