"""Which characters are read as which: the edits that turn labels into readings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from rapidfuzz.distance import Levenshtein


def align(label: str, reading: str, key: Callable[[str], str] = str) -> list[tuple[str, str]]:
    """Pairs (character of the label, character of the reading) of a shortest edit.

    "" in a pair's first place is an insertion (read, not there), in its second a deletion (there, not read).
    Characters with the same `key` are equal.
    """
    pairs: list[tuple[str, str]] = []
    for code in Levenshtein.opcodes([*map(key, label)], [*map(key, reading)]):
        left = label[code.src_start : code.src_end]
        right = reading[code.dest_start : code.dest_end]
        if code.tag == "insert":
            pairs += [("", character) for character in right]
        elif code.tag == "delete":
            pairs += [(character, "") for character in left]
        else:  # equal or replace: of one length
            pairs += zip(left, right, strict=True)
    return pairs


def confusions(pairs: Iterable[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """How often each edit is needed to turn labels into readings; equal characters are not counted.

    Args:
        pairs: (label, reading) of images, both normalised.
    """
    return Counter(edit for label, reading in pairs for edit in align(label, reading) if edit[0] != edit[1])
