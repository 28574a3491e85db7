"""The elements of one list of a large JSON object, without the whole of it in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from lmim_fast.errors import DataError

_BLOCK = 2**16  # characters read at a time
_MAX_VALUE = 2**24
"""Characters of one element, or of one value beside the list: above it the file is refused."""
_SPACE = " \t\r\n"


def elements(file: TextIO, name: str, key: str) -> Iterator[Any]:
    """The elements of the list `key` of the object that the file holds, in order.

    Args:
        name: the file, for messages.
    Raises:
        DataError: the file is no JSON object with such a list, or has a value of more than 16 MiB.
    """
    reader = _Reader(file, name)
    found = False
    reader.expect("{")
    while not reader.take("}"):
        this = reader.value()
        reader.expect(":")
        if this == key:
            found = True
            reader.expect("[")
            while not reader.take("]"):
                yield reader.value()
                reader.take(",")
        else:
            reader.value()
        reader.take(",")
    if not found:
        raise DataError(f"{name}: no list {key!r} in the JSON object; is it another format?")


class _Reader:
    """Values one after the other from a file; a missing comma is not noticed, anything else is."""

    def __init__(self, file: TextIO, name: str) -> None:
        self._file, self._name = file, name
        self._buffer, self._at = "", 0
        self._passed = 0  # characters in front of the buffer
        self._ended = False
        self._decoder = json.JSONDecoder()

    def take(self, character: str) -> bool:
        """Whether `character` comes next, after white space; then it is passed."""
        if self._next() != character:
            return False
        self._at += 1
        return True

    def expect(self, character: str) -> None:
        """Pass `character`."""
        if not self.take(character):
            self._fail(f"{character!r} expected, found {self._next()[:1]!r}")

    def value(self) -> Any:
        """Pass and give one value."""
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except RecursionError:
                self._fail("nested too deeply")
            except ValueError as error:
                if self._ended:
                    self._fail(str(error).partition(":")[0])
            else:
                if end < len(self._buffer) or self._ended:  # else a number may go on
                    self._at = end
                    return value
            if len(self._buffer) - self._at > _MAX_VALUE:
                self._fail(f"no value of less than {_MAX_VALUE} characters")
            self._fill(len(self._buffer) - self._at)

    def _next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in _SPACE:
                    return self._buffer[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._fill(0)

    def _fill(self, pending: int) -> None:
        """Read on; as much again as is pending, so that a long value is parsed a few times only."""
        text = self._file.read(max(_BLOCK, pending))
        self._ended = not text
        self._passed += self._at
        self._buffer, self._at = self._buffer[self._at :] + text, 0

    def _fail(self, what: str) -> None:
        raise DataError(f"{self._name}: not JSON at character {self._passed + self._at}: {what}")
