"""Word lists: files of `word` or `word<TAB>weight` lines, held as bytes and drawn by weight.

Ten million words are one block of bytes and an array of places, about 20 bytes a word, not as many strings.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lmim_fast.errors import UsageError

_ARRAYS = ("text", "ends", "cumulative")
_BLOCK = 2**16  # words read at a time
_LARGEST_WEIGHT = 1e15  # the sum of ten million stays exact enough to tell one word of weight 1 apart


@dataclass(frozen=True)
class WordList:
    """Words in the order of their files; a word that is listed twice is drawn twice as often."""

    text: np.ndarray
    """(bytes,) uint8: all words in UTF-8, one behind the other."""
    ends: np.ndarray
    """(words,) int64: where each word ends in `text`."""
    cumulative: np.ndarray | None
    """(words,) float64: sums of the weights; None: all words are equally likely."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: int) -> str:
        start = int(self.ends[place - 1]) if place else 0
        return self.text[start : int(self.ends[place])].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.data, 0
        for block in range(0, len(self), _BLOCK):
            for end in self.ends[block : block + _BLOCK].tolist():
                yield str(text[start:end], "utf-8")
                start = end

    def characters(self) -> set[str]:
        """Every character of the words."""
        found: set[str] = set()
        start = 0
        for block in range(0, len(self), _BLOCK):
            end = int(self.ends[min(block + _BLOCK, len(self)) - 1])
            found.update(self.text[start:end].tobytes().decode())
            start = end
        return found

    def draw(self, rng: np.random.Generator) -> str:
        """One word by weight, found in O(log words)."""
        if self.cumulative is None:
            return self[int(rng.integers(len(self)))]
        place = np.searchsorted(self.cumulative, rng.random() * self.cumulative[-1], side="right")
        return self[min(int(place), len(self) - 1)]

    def where(self, kept: np.ndarray) -> WordList:
        """The words for which `kept`, (words,) bool, holds."""
        lengths = np.diff(self.ends, prepend=0)
        weights = None if self.cumulative is None else np.diff(self.cumulative, prepend=0.0)[kept]
        return WordList(
            self.text[np.repeat(kept, lengths)],
            np.cumsum(lengths[kept]),
            None if weights is None else np.cumsum(weights),
        )

    def save(self, folder: Path) -> None:
        """Write the list into files of this folder, for `mapped`."""
        for name in _ARRAYS:
            if getattr(self, name) is not None:
                np.save(folder / f"words-{name}.npy", getattr(self, name))

    @classmethod
    def mapped(cls, folder: Path) -> WordList:
        """The list that was saved there; the processes that map it share its memory."""
        paths = (folder / f"words-{name}.npy" for name in _ARRAYS)
        # A plain array: indexing a memmap costs ten times as much.
        arrays: Any = (np.asarray(np.load(path, mmap_mode="r")) if path.exists() else None for path in paths)
        return cls(*arrays)


def read_words(
    paths: Sequence[str], max_length: int, say: Callable[[str], None] = lambda line: None
) -> tuple[WordList, str]:
    """The words of all files, those longer than `max_length` left out and their number said, and a digest.

    Args:
        paths: UTF-8 files with one word a line, or `word<TAB>weight`; none: the built-in English list.
    Raises:
        UsageError: a file cannot be read or has a line that is no word; or no word is short enough.
    """
    reader = _Reader(max_length)
    if paths:
        for path in paths:
            reader.read_file(path)
    else:
        builtin = resources.files("lmim_fast.data.render").joinpath("words.txt").read_bytes()
        for number, line in enumerate(builtin.splitlines(keepends=True), 1):
            reader.add("words.txt", number, line)
    if not reader.ends:
        source = "the built-in list" if not paths else f"the word file {paths[0]}"
        if len(paths) > 1:
            source += f" and {len(paths) - 1} more"
        raise UsageError(
            f"no word of {source} has at most {max_length} characters (the shortest has {reader.shortest}); "
            "raise max_length"
        )
    if reader.too_long and paths:
        say(f"left out: {reader.too_long:,} words longer than {max_length} characters (max_length)")
    return reader.words(), reader.digest.hexdigest()


class _Reader:
    """Collects the lines of files."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.digest = hashlib.sha256()
        self.text = bytearray()
        self.ends = array("q")
        self.weights = array("d")
        self.weighted = False
        self.shortest = math.inf
        self.too_long = 0

    def read_file(self, path: str) -> None:
        position, number, before = 0, 0, len(self.ends) + self.too_long
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    self.add(path, number, line, position)
                    position += len(line)
        except OSError as error:
            raise UsageError(f"cannot read the word file {path}: {error.strerror}") from error
        if len(self.ends) + self.too_long == before:
            raise UsageError(f"the word file {path} holds no word (one a line is expected)")

    def add(self, path: str, number: int, line: bytes, position: int = 0) -> None:
        """Take in line `number` of a file, which begins at byte `position`."""
        self.digest.update(line)
        try:
            word, tab, weight = line.decode("utf-8-sig" if number == 1 else "utf-8").strip().partition("\t")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"the word file {path} is not UTF-8 (byte {position + error.start}): {error.reason}"
            ) from error
        word = word.rstrip()
        if not word:
            return
        if not any(map(stands_alone, word)):
            raise UsageError(f"the word file {path} has a line without a visible character: {word!r}")
        value = _weight(weight, f"{path}, line {number}") if tab else 1.0
        self.shortest = min(self.shortest, len(word))
        if len(word) > self.max_length:
            self.too_long += 1
            return
        self.text += word.encode()
        self.ends.append(len(self.text))
        self.weights.append(value)
        self.weighted |= value != 1.0

    def words(self) -> WordList:
        weights = np.frombuffer(self.weights, np.float64)
        return WordList(
            np.frombuffer(self.text, np.uint8),
            np.frombuffer(self.ends, np.int64),
            np.cumsum(weights) if self.weighted else None,
        )


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0.0 < weight <= _LARGEST_WEIGHT:
        raise UsageError(
            f"{where}: the weight of a word must be a positive number, got {text[:40]!r}"
            " (a line is `word` or `word<TAB>weight`)"
        )
    return weight


def stands_alone(character: str) -> bool:
    """Letters, numbers, punctuation and symbols; not spaces, combining marks or control characters."""
    return unicodedata.category(character)[0] in "LNPS"
