"""Keys of the field's layout, and words for those of a database that has others.

Layout: `num-samples`, and `image-%09d` (encoded bytes) and `label-%09d` (UTF-8; all may be absent), counted
from 1 or from 0.
"""

from __future__ import annotations

import re
from typing import Any

COUNT_KEY = b"num-samples"

_KINDS_SHOWN = 4
_KEY_SHOWN = 40  # bytes
_DIGITS = re.compile(rb"[0-9]+")


def image_key(number: int) -> bytes:
    """Key of the image with this number."""
    return b"image-%09d" % number


def label_key(number: int) -> bytes:
    """Key of the label with this number."""
    return b"label-%09d" % number


def first_number(transaction: Any) -> int:
    """0 if the records are counted from 0, else 1."""
    return 0 if any(transaction.get(key(0)) is not None for key in (image_key, label_key)) else 1


def last_image(transaction: Any) -> int | None:
    """Number of the last well-formed image key, None without one. Keys are sorted, so no scan is needed."""
    cursor = transaction.cursor()
    there = cursor.set_range(b"image-:") or cursor.last()  # ":" follows "9": behind every image number
    while there and (key := bytes(cursor.key())) >= b"image-":
        number = key.removeprefix(b"image-")
        if len(number) == 9 and number.isdigit():
            return int(number)
        there = cursor.prev()
    return None


def has_label(transaction: Any, first: int, count: int) -> bool:
    """Whether any record has a label: their keys stand together, so that one look finds the first."""
    cursor = transaction.cursor()
    last = label_key(first + count - 1)
    return bool(cursor.set_range(label_key(first))) and label_key(first) <= bytes(cursor.key()) <= last


def has_only_labels(transaction: Any) -> bool:
    """Whether there are keys of labels and none that begins as those of images do."""
    cursor = transaction.cursor()
    if not (cursor.set_range(b"label-") and bytes(cursor.key()).startswith(b"label-")):
        return False
    return not (cursor.set_range(b"im") and bytes(cursor.key()).startswith((b"image", b"img")))


def kinds_of_keys(transaction: Any) -> str:
    """First and last key of each kind (what stands before the number), for people. Without a scan."""
    cursor = transaction.cursor()
    kinds: list[str] = []
    there = cursor.first()
    while there:
        if len(kinds) == _KINDS_SHOWN:
            return ", ".join([*kinds, "..."])
        first = bytes(cursor.key())
        digits = _DIGITS.search(first)
        if digits is None:
            kinds.append(_shown(first))
            there = cursor.next()
            continue
        # Behind the last key with this prefix and a number; where that is the end, the last key of all.
        there = cursor.set_range(first[: digits.start()] + b":")
        there_before = cursor.prev() if there else cursor.last()
        last = bytes(cursor.key()) if there_before else first
        kinds.append(_shown(first) if last == first else f"{_shown(first)} .. {_shown(last)}")
        there = cursor.next()
    return ", ".join(kinds)


def _shown(key: bytes) -> str:
    """A key as it is if it is printable ASCII, else with escapes; a long one cut short."""
    text = repr(key[:_KEY_SHOWN])[2:-1]
    return text + "..." if len(key) > _KEY_SHOWN else text
