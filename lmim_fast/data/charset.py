"""Character sets: which character is which class of the recogniser."""

from __future__ import annotations

import hashlib
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lmim_fast.config.recognizer import SPECIAL_CLASSES
from lmim_fast.errors import UsageError

REPLACEMENT = "\ufffd"
"""What UNK decodes to, and what bytes that are not UTF-8 become; no set holds it."""
NAMED = ("36", "62", "94")
"""The first so many printable ASCII characters: 0-9 a-z, then A-Z, then punctuation."""

_BREAKS_TEXT = {"Cc": "control character", "Cs": "surrogate", "Zl": "line break", "Zp": "paragraph break"}


@dataclass(frozen=True)
class Charset:
    """Characters 0 .. n - 1 in the order of the string, then the classes EOS, PAD and UNK.

    A set that has lower-case letters and no upper-case letter reads text without case: it encodes `A` as `a`.

    Args:
        characters: each one once; one space character at most, and nothing that breaks text or is U+FFFD.
    Raises:
        UsageError: no character, one twice, or one that cannot be a class.
    """

    characters: str

    def __post_init__(self) -> None:
        if not self.characters:
            raise UsageError("the character set is empty; it needs at least one character")
        spaces = [character for character in self.characters if character.isspace()]
        for number, character in enumerate(self.characters):
            problem = refusal(character)
            if problem:
                raise UsageError(f"character {number} of the set is {describe(character)}: {problem}")
        if len(self._numbers) < len(self.characters):
            twice = next(c for c in self.characters if self.characters.count(c) > 1)
            raise UsageError(
                f"the character set has {describe(twice)} {self.characters.count(twice)} times; keep it once"
            )
        if len(spaces) > 1:
            raise UsageError(
                f"the character set has {len(spaces)} kinds of space"
                f" ({', '.join(map(describe, spaces))}); keep one"
            )

    @classmethod
    def named(cls, name: str | Path) -> Charset:
        """The set called 36, 62 or 94, or the set of a file with one character a line.

        The file is UTF-8; a byte order mark and CRLF are allowed. A line with one space is the space
        character. The order of the lines is the order of the classes.

        Raises:
            UsageError: no such file, not UTF-8, or a line that is empty, longer than a character, refused as
                a class or a repetition; the message names the lines.
        """
        if str(name) in NAMED:
            return cls(string.printable[: int(str(name))])
        return cls(_read(Path(name)))

    def __len__(self) -> int:
        return len(self.characters)

    def __contains__(self, character: object) -> bool:
        return character in self._numbers

    @property
    def eos(self) -> int:
        """Class that ends a word."""
        return len(self.characters)

    @property
    def pad(self) -> int:
        """Class that fills targets behind EOS."""
        return len(self.characters) + 1

    @property
    def unknown(self) -> int:
        """Class of characters outside the set."""
        return len(self.characters) + 2

    @property
    def classes(self) -> int:
        """Characters and EOS, PAD, UNK."""
        return len(self.characters) + SPECIAL_CLASSES

    @property
    def start(self) -> int:
        """Row of the embedding that begins every word; no class."""
        return self.classes

    @cached_property
    def folds_case(self) -> bool:
        """Whether upper-case letters encode as their lower-case ones."""
        return any(c.islower() for c in self.characters) and not any(map(_is_upper, self.characters))

    def holds(self, text: str) -> bool:
        """Whether every character of the text has a class of its own, case folded where the set does."""
        return all(character in self._numbers for character in self.fold(text))

    def fold(self, text: str) -> str:
        """The text in lower case if the set folds case, else unchanged; as many characters as before."""
        if not self.folds_case:
            return text
        return "".join(lower if len(lower := c.lower()) == 1 else c for c in text)

    def outside(self, text: str) -> str:
        """The characters of the text that encode as UNK, as they stand there."""
        folded = self.fold(text)
        return "".join(c for c, kept in zip(text, folded, strict=True) if kept not in self._numbers)

    def encode(self, label: str) -> list[int]:
        """Classes of the label's characters, UNK for those outside the set; without EOS."""
        unknown, numbers = self.unknown, self._numbers
        return [numbers.get(character, unknown) for character in self.fold(label)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the classes up to the first EOS, or of all; UNK and PAD before it become U+FFFD.

        Raises:
            ValueError: a number that is no class.
        """
        text = []
        for number in map(int, ids):
            if not 0 <= number < self.classes:
                raise ValueError(f"class must be in [0, {self.classes}), got {number}")
            if number == self.eos:
                break
            text.append(self.characters[number] if number < self.eos else REPLACEMENT)
        return "".join(text)

    def fingerprint(self) -> str:
        """16 hex digits of the characters and their order."""
        return hashlib.blake2b(self.characters.encode(), digest_size=8).hexdigest()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {character: number for number, character in enumerate(self.characters)}


def shared_classes(old: Charset, new: Charset) -> list[tuple[int, int]]:
    """(class in `old`, class in `new`) of what both have: characters in the new order, then EOS, PAD, UNK.

    The row of the start token is no class: it goes from `old.start` to `new.start`.
    """
    pairs = [(old.characters.index(c), number) for number, c in enumerate(new.characters) if c in old]
    return [*pairs, (old.eos, new.eos), (old.pad, new.pad), (old.unknown, new.unknown)]


def refusal(character: str) -> str | None:
    """Why a character cannot be a class; None: it can."""
    if character == REPLACEMENT:
        return "it stands for unknown characters, remove it"
    if character == "\ufeff":
        return "a byte order mark is no character, remove it"
    kind = _BREAKS_TEXT.get(unicodedata.category(character))
    return f"a {kind} cannot be a class, remove it" if kind else None


def describe(character: str) -> str:
    """The character for messages: itself where it can be seen, its number and its name."""
    name = unicodedata.name(character, "")
    code = f"U+{ord(character):04X}" + (f" {name}" if name else "")
    return f"{character!r} ({code})"


def _is_upper(character: str) -> bool:
    return unicodedata.category(character) == "Lu"  # Roman numerals and circled letters are no capitals


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"character set {str(path)!r} cannot be read ({error.strerror}); give {', '.join(NAMED)} or a"
            " file with one character a line"
        ) from error
    except UnicodeDecodeError as error:
        number = 1 + error.object.count(b"\n", 0, error.start)
        raise UsageError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not lines[-1]:
        lines.pop()
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            raise UsageError(
                f"{path}, line {number}: empty; remove it (a space character is a line of one space)"
            )
        if len(line) > 1:
            raise UsageError(
                f"{path}, line {number}: {line[:20]!r} has {len(line)} characters; write one a line"
            )
        if problem := refusal(line):
            raise UsageError(f"{path}, line {number}: {describe(line)}: {problem}")
        if line in first:
            raise UsageError(
                f"{path}: {describe(line)} is on line {first[line]} and again on line {number}; keep one"
            )
        first[line] = number
    if not first:
        raise UsageError(f"{path}: the file is empty; write one character a line")
    return "".join(first)
