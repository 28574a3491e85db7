"""What the renderer writes: words in varied case, random strings and numbers, each with a font for it."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lmim_fast.data.render.fonts import Font, check_shaping, font_files, load_fonts
from lmim_fast.errors import UsageError

PRINTABLE = string.printable[:94]
_NAMED_IN_ERRORS = 5  # uncovered words listed in the message


@dataclass(frozen=True)
class Vocabulary:
    """Draws labels: never longer than `max_length`, and always with a font that has every glyph."""

    words: tuple[str, ...]
    alphabet: str
    """Characters of the random strings."""
    fonts: tuple[Font, ...]
    max_length: int
    random_share: float
    english: bool
    """The built-in list: punctuation after words and made-up addresses are plausible."""

    def draw(self, rng: np.random.Generator) -> tuple[str, Font]:
        """One label and a font that draws all of it."""
        if rng.random() < self.random_share:
            font = _pick(rng, self.fonts)
            return self._random_label(rng, font), font
        word = _pick(rng, self.words)
        for label in (self._dressed(rng, word), word):
            fonts = (
                [font for font in self.fonts if font.covers(label)]
                if 0 < len(label) <= self.max_length
                else []
            )
            if fonts:
                return label, _pick(rng, fonts)
        raise AssertionError(f"no font covers {word!r}: the vocabulary was not checked")

    def _dressed(self, rng: np.random.Generator, word: str) -> str:
        """The word in one of its cases, now and then with punctuation behind it."""
        case = rng.choice(4, p=(0.25, 0.25, 0.30, 0.20))
        title = " ".join(part[:1].upper() + part[1:].lower() for part in word.split(" "))
        cased = (word, word.lower(), word.upper(), title)[case]
        if self.english and rng.random() < 0.06 and cased[-1].isalnum():
            cased += _pick(rng, ".,!?:")
        return cased

    def _random_label(self, rng: np.random.Generator, font: Font) -> str:
        """A random string or number in characters that the font draws."""
        for _ in range(
            4
        ):  # a font without digits refuses most numbers; the string of its own letters always works
            label = _pick(rng, self._makers)(rng)[: self.max_length]
            if label and font.covers(label):
                return label
        return self._string(rng, self._letters[font])

    @cached_property
    def _letters(self) -> dict[Font, str]:
        """The random strings' characters that each font draws."""
        return {font: "".join(filter(font.covers, self.alphabet)) for font in self.fonts}

    @cached_property
    def _makers(self) -> tuple[Callable[[np.random.Generator], str], ...]:
        upper_digits = string.ascii_uppercase + string.digits

        def numbers(rng: np.random.Generator) -> str:
            return _characters(rng, string.digits, int(rng.integers(1, 8)))

        def strings(rng: np.random.Generator) -> str:
            return self._string(rng, self.alphabet)

        def codes(rng: np.random.Generator) -> str:
            return self._string(rng, upper_digits)

        def addresses(rng: np.random.Generator) -> str:
            return _address(rng, self.words)

        if self.english:
            letters = string.ascii_letters

            def names(rng: np.random.Generator) -> str:
                return self._string(rng, letters)

            return numbers, formatted_number, formatted_number, strings, codes, names, addresses
        return numbers, formatted_number, strings, strings, strings

    def _string(self, rng: np.random.Generator, characters: str) -> str:
        """Mostly short, and now and then as long as a label may be."""
        share = rng.random() if rng.random() < 0.2 else rng.beta(1.1, 2.2)
        return _characters(rng, characters, 1 + min(int(share * self.max_length), self.max_length - 1))


def load_vocabulary(
    words_file: str | None, fonts_folder: str | None, max_length: int, random_share: float
) -> Vocabulary:
    """Read the words and fonts and check that they fit each other.

    Args:
        words_file:   UTF-8 file with one word a line, or None for the built-in English list.
        fonts_folder: folder of font files at any depth, or None for matplotlib's.
    Raises:
        UsageError: a file or folder that is missing, unreadable or empty, or a word that no font can write.
    """
    english = words_file is None
    words = _short_words(_read_words(words_file), max_length, words_file)
    alphabet = PRINTABLE if english else _own_alphabet(words)
    cased = sorted({form for word in words for form in (word, word.lower(), word.upper())})
    check_shaping(cased)
    files = font_files(fonts_folder)
    fonts = load_fonts(files, set(PRINTABLE).union(alphabet, *cased))
    writers = tuple(font for font in fonts if any(map(font.covers, words)))
    _check_coverage(words, writers, files, fonts_folder)
    return Vocabulary(words, alphabet, writers, max_length, random_share, english)


def formatted_number(rng: np.random.Generator) -> str:
    """A price, time, date, phone number, share, measure or house number."""
    a, b, c = (int(value) for value in rng.integers(0, 1000, 3))
    return _pick(
        rng,
        (
            f"${a / 10:.2f}",
            f"{a}.{b % 100:02d}",
            f"{a % 24:02d}:{b % 60:02d}",
            f"{1 + a % 28:02d}/{1 + b % 12:02d}/{1950 + c % 100}",
            f"{1950 + a % 100}",
            f"0{a:03d}-{b:03d}{c:03d}",
            f"({a:03d}){b:03d}-{c:03d}{a % 10}",
            f"+{1 + a % 98}-{b:03d}-{c:03d}",
            f"{a % 101}%",
            f"-{a % 90}%",
            f"{1 + a}{('km', 'm', 'kg', 'ml', 'cm', 'GB', 'mm')[b % 7]}",
            f"No.{1 + a}",
            f"{1 + a % 300}-{2 + a % 300 + b % 9}",
            f"{1 + a},{b:03d}",
            f"#{a}",
        ),
    )


def _address(rng: np.random.Generator, words: Sequence[str]) -> str:
    """A made-up web or mail address."""
    name, other = ("".join(filter(str.isalnum, _pick(rng, words).lower())) for _ in range(2))
    ending = _pick(rng, (".com", ".org", ".net", ".co.uk", ".info", ".shop"))
    return _pick(
        rng, (f"www.{name}{ending}", f"{name}@{other}{ending}", f"{name}{other}{ending}", f"@{name}_{other}")
    )


def _characters(rng: np.random.Generator, characters: str, length: int) -> str:
    return "".join(characters[place] for place in rng.integers(0, len(characters), length))


def _pick(rng: np.random.Generator, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _read_words(path: str | None) -> tuple[str, ...]:
    """Distinct lines without the blanks around them, in the file's order."""
    if path is None:
        text = resources.files("lmim_fast.data.render").joinpath("words.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"the word file {path} is not UTF-8 (byte {error.start}): {error.reason}"
            ) from error
        except OSError as error:
            raise UsageError(f"cannot read the word file {path}: {error.strerror}") from error
    words = tuple(dict.fromkeys(filter(None, map(str.strip, text.splitlines()))))
    if not words:
        raise UsageError(f"the word file {path} holds no word (one a line is expected)")
    for word in words:
        if not any(map(_stands_alone, word)):
            raise UsageError(f"the word file {path} has a line without a visible character: {word!r}")
    return words


def _short_words(words: tuple[str, ...], max_length: int, path: str | None) -> tuple[str, ...]:
    short = tuple(word for word in words if len(word) <= max_length)
    if not short:
        source = "the built-in list" if path is None else f"the word file {path}"
        shortest = min(map(len, words))
        raise UsageError(
            f"no word of {source} has at most {max_length} characters (the shortest has {shortest}); "
            "raise max_length"
        )
    return short


def _own_alphabet(words: Iterable[str]) -> str:
    """Characters of an own word list that make sense in any order (no spaces, no combining marks)."""
    return "".join(sorted(filter(_stands_alone, set().union(*words))))


def _stands_alone(character: str) -> bool:
    """Letters, numbers, punctuation and symbols; not spaces, combining marks or control characters."""
    return unicodedata.category(character)[0] in "LNPS"


def _check_coverage(
    words: Sequence[str], fonts: Sequence[Font], files: Sequence[Path], folder: str | None
) -> None:
    """Every word needs one font that has all its characters."""
    missing = [word for word in words if not any(font.covers(word) for font in fonts)]
    if not missing:
        return
    listed = ", ".join(repr(word) for word in missing[:_NAMED_IN_ERRORS])
    if len(missing) > _NAMED_IN_ERRORS:
        listed += ", ..."
    source = "that come with matplotlib" if folder is None else f"in {folder}"
    absent = sorted(
        c for c in set().union(*missing[:_NAMED_IN_ERRORS]) if not any(f.covers(c) for f in fonts)
    )
    detail = (
        "no font has " + " ".join(f"{c!r} (U+{ord(c):04X})" for c in absent[:_NAMED_IN_ERRORS])
        if absent
        else "no single font has all their characters"
    )
    raise UsageError(
        f"{len(missing)} of {len(words)} words cannot be written with the {len(files)} fonts {source}: "
        f"{listed} ({detail}); give a folder with fonts for this script, or take the words out"
    )
