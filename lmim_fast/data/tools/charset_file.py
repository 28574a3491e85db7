"""`lmim data charset`: the characters of labels, written as a file that `Charset.named` reads."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmim_fast.config.tools import CharsetConfig
from lmim_fast.data.charset import Charset, describe, refusal
from lmim_fast.data.normalize import chinese
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.tools.files import write_whole
from lmim_fast.errors import DataError, UsageError

RAREST = 10  # characters named in the report
_BLOCK = 4096  # labels read at a time
_FORMS: dict[str, Callable[[str], str]] = {
    "none": lambda label: label,
    "nfkc": lambda label: unicodedata.normalize("NFKC", label),
    "chinese": chinese,
}


@dataclass(frozen=True)
class CharsetFile:
    """A written character set, and what it was made of."""

    path: str
    charset: Charset
    counts: dict[str, int]
    """Characters of the set to occurrences, in class order."""
    rare: dict[str, int]
    """Characters that occur less than `min_count` times, with their occurrences."""
    refused: dict[str, str]
    """Characters that cannot be a class, and why."""
    labels: int
    missing: int
    """Records without a label."""
    empty: int
    """Labels without a character, after normalisation."""

    def report_lines(self) -> list[str]:
        """For people: sizes, the rarest characters and all that was left out."""
        occurrences = sum(self.counts.values())
        lines = [
            f"{self.path}: {len(self.charset):,} characters ({self.charset.classes:,} classes with EOS, PAD"
            f" and UNK) from {self.labels:,} labels of {occurrences:,} characters"
        ]
        if self.missing:
            lines.append(f"{self.missing:,} records have no label")
        if self.empty:
            lines.append(f"{self.empty:,} labels are empty")
        lines.append(f"rarest: {_listed(self.counts)}")
        if self.rare:
            lines.append(f"left out as too rare, {len(self.rare):,} characters: {_listed(self.rare)}")
        lines += [f"left out: {describe(c)}: {reason}" for c, reason in self.refused.items()]
        return lines


def write_charset(config: CharsetConfig) -> CharsetFile:
    """Count the characters of all labels under `config.paths` and write the set.

    Raises:
        DataError:  no label, no character left, or a database that cannot be read.
        UsageError: the output exists or cannot be written.
    """
    output = Path(config.output)
    if os.path.lexists(output):
        raise UsageError(f"{output} exists; remove it or choose another --output")
    store = RecordStore(config.paths)
    try:
        found, labels, empty = _count(store, _FORMS[config.normalize])
        missing = len(store) - labels
    finally:
        store.close()
    if not labels:
        raise DataError(f"none of {missing} records under {', '.join(config.paths)} has a label")
    by_frequency = sorted(found, key=lambda c: (-found[c], c))
    refused = _refused(by_frequency)
    rare = {c: found[c] for c in by_frequency if c not in refused and found[c] < config.min_count}
    chosen = [c for c in by_frequency if c not in refused and c not in rare]
    if not chosen:
        raise DataError(
            f"no character of {labels} labels is left: {len(rare)} occur less than min_count ="
            f" {config.min_count} times, {len(refused)} cannot be classes"
        )
    if config.order == "codepoint":
        chosen.sort()
    charset = Charset("".join(chosen))
    write_whole(output, "".join(f"{character}\n" for character in charset.characters).encode())
    counts = {c: found[c] for c in charset.characters}
    return CharsetFile(str(output), charset, counts, rare, refused, labels, missing, empty)


def _count(store: RecordStore, form: Callable[[str], str]) -> tuple[Counter[str], int, int]:
    """Occurrences of characters, labels, and labels without a character."""
    characters: Counter[str] = Counter()
    labels = empty = 0
    for start in range(0, len(store), _BLOCK):
        for label in store.labels(range(start, min(start + _BLOCK, len(store)))):
            if label is not None:
                text = form(label)
                characters.update(text)
                labels += 1
                empty += not text
    return characters, labels, empty


def _refused(characters: list[str]) -> dict[str, str]:
    """Those that cannot be a class; of several kinds of space all but the first."""
    refused: dict[str, str] = {}
    space = ""
    for character in characters:
        reason = refusal(character)
        if reason:
            refused[character] = reason
        elif character.isspace():
            if space:
                refused[character] = f"a set has one space, {describe(space)} is more frequent"
            space = space or character
    return refused


def _listed(counts: dict[str, int]) -> str:
    rarest = sorted(counts, key=lambda c: (counts[c], c))[:RAREST]
    more = f" and {len(counts) - RAREST:,} more" if len(counts) > RAREST else ""
    return ", ".join(f"{c!r} {counts[c]:,}" for c in rarest) + more
