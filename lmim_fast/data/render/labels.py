"""What the renderer writes: words in varied case, lines of words, random strings and numbers."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmim_fast.data.render.coverage import Coverage
from lmim_fast.data.render.fonts import Face
from lmim_fast.data.render.numbers import formatted_number
from lmim_fast.data.render.scripts import WIDE_ENDINGS, WIDE_QUOTES, is_wide
from lmim_fast.data.render.wordlist import WordList, stands_alone

PRINTABLE = string.printable[:94]
_LONGEST_LINE = 4  # words
_TRIES = 8  # draws of a line or a number before something simpler is written


@dataclass(frozen=True)
class Vocabulary:
    """Draws labels: never longer than `max_length`, and always with a face that has every glyph."""

    words: WordList
    alphabet: str
    """Characters of the random strings."""
    coverage: Coverage
    max_length: int
    random_share: float
    lines_share: float
    english: bool
    """The built-in list: punctuation after words and made-up addresses are plausible."""

    def draw(self, rng: np.random.Generator) -> tuple[str, Face]:
        """One label and a face that draws all of it."""
        kind = rng.random()
        if kind < self.random_share:
            place = int(rng.integers(len(self.coverage.faces)))
            label = self._random_label(rng, place)
            if label:
                return label, self.coverage.faces[place]
        elif kind < self.random_share + self.lines_share:
            for _ in range(_TRIES):
                label = self._line(rng)
                face = self.coverage.pick(rng, label) if len(label) <= self.max_length else None
                if face is not None:
                    return label, face
        word = self.words.draw(rng)
        for label in (self._dressed(rng, word), word):
            face = self.coverage.pick(rng, label) if 0 < len(label) <= self.max_length else None
            if face is not None:
                return label, face
        raise AssertionError(f"no face covers {word!r}: the vocabulary was not checked")

    def _dressed(self, rng: np.random.Generator, word: str) -> str:
        """The word in one of its cases, now and then with punctuation behind or around it."""
        cased = _CASES[rng.choice(4, p=(0.25, 0.25, 0.30, 0.20))](word)
        if self.english and rng.random() < 0.06 and cased[-1].isalnum():
            cased += _pick(rng, ".,!?:")
        elif is_wide(word[-1]) and stands_alone(word[-1]) and rng.random() < 0.12:
            if rng.random() < 0.5:
                return cased + _pick(rng, WIDE_ENDINGS)
            before, behind = _pick(rng, WIDE_QUOTES)
            return f"{before}{cased}{behind}"
        return cased

    def _line(self, rng: np.random.Generator) -> str:
        """Two to four words, one of them at times a number, all in one case."""
        parts = [self.words.draw(rng) for _ in range(int(rng.integers(2, _LONGEST_LINE + 1)))]
        if rng.random() < 0.2:
            parts[int(rng.integers(1, len(parts)))] = formatted_number(rng)
        while len(parts) > 2 and sum(map(len, parts)) + len(parts) - 1 > self.max_length:
            parts.pop()
        case = _CASES[int(rng.integers(len(_CASES)))]
        line = parts[0]
        # Chinese and Japanese are written without spaces; a sign may still keep its parts apart.
        between = (" ", "", "", _pick(rng, WIDE_ENDINGS[:4]))[int(rng.integers(4))]
        for part in parts[1:]:
            line += (between if is_wide(line[-1]) and is_wide(part[0]) else " ") + part
        return case(line)

    def _random_label(self, rng: np.random.Generator, place: int) -> str:
        """A random string or number in characters that the face draws; "" if it has none of the alphabet."""
        for _ in range(4):  # a face without digits refuses most numbers; a string of its own letters never
            label = _pick(rng, self._makers)(rng, place)[: self.max_length]
            if label and self.coverage.claims(label) >> place & 1 and self.coverage.draws(place, label):
                return label
        return self._string(rng, self.alphabet, place)

    @property
    def _makers(self) -> tuple[Callable[[np.random.Generator, int], str], ...]:
        if self.english:
            return (
                self._digits,
                self._number,
                self._number,
                self._any,
                self._code,
                self._name,
                self._address,
            )
        return self._digits, self._number, self._any, self._any, self._any

    def _digits(self, rng: np.random.Generator, place: int) -> str:
        return "".join(map(str, rng.integers(0, 10, int(rng.integers(1, 8)))))

    def _number(self, rng: np.random.Generator, place: int) -> str:
        return formatted_number(rng)

    def _any(self, rng: np.random.Generator, place: int) -> str:
        return self._string(rng, self.alphabet, place)

    def _code(self, rng: np.random.Generator, place: int) -> str:
        return self._string(rng, string.ascii_uppercase + string.digits, place)

    def _name(self, rng: np.random.Generator, place: int) -> str:
        return self._string(rng, string.ascii_letters, place)

    def _string(self, rng: np.random.Generator, characters: str, place: int) -> str:
        """Mostly short, and now and then as long as a label may be."""
        share = rng.random() if rng.random() < 0.2 else rng.beta(1.1, 2.2)
        length = 1 + min(int(share * self.max_length), self.max_length - 1)
        return self.coverage.pick_characters(rng, place, characters, length)

    def _address(self, rng: np.random.Generator, place: int) -> str:
        """A made-up web or mail address."""
        name, other = ("".join(filter(str.isalnum, self.words.draw(rng).lower())) for _ in range(2))
        ending = _pick(rng, (".com", ".org", ".net", ".co.uk", ".info", ".shop"))
        return _pick(
            rng,
            (f"www.{name}{ending}", f"{name}@{other}{ending}", f"{name}{other}{ending}", f"@{name}_{other}"),
        )


def _as_it_is(text: str) -> str:
    return text


def _title(text: str) -> str:
    return " ".join(part[:1].upper() + part[1:].lower() for part in text.split(" "))


_CASES: tuple[Callable[[str], str], ...] = (_as_it_is, str.lower, str.upper, _title)


def _pick(rng: np.random.Generator, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]
