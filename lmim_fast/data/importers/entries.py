"""What a format gives to the import: entries in a fixed order, each an image, a refusal or nothing."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_BREAKS_TEXT = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, line and paragraph breaks


class Refused(Exception):
    """One record cannot be used: the reason is a phrase that many records share, the detail its own."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Box:
    """A text on a page: its corners (x, y), clockwise from the text's top left, and its label."""

    points: tuple[tuple[float, float], ...]
    label: str


@dataclass(frozen=True, slots=True)
class Reject:
    """An entry that gives no record."""

    where: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """One image, to be stored as a record, or cut into one record for each box.

    `read` gives the encoded bytes, in any thread, and may raise Refused.
    """

    where: str
    read: Callable[[], bytes]
    label: str | None = None
    boxes: tuple[Box, ...] | None = None
    ignored: int = 0
    """Boxes that are marked as unreadable, and left out of `boxes`."""
    refused: tuple[Reject, ...] = ()
    """Boxes that cannot be used."""
    size: int = 0
    """Bytes that the entry holds in memory before `read`."""


@dataclass(frozen=True, slots=True)
class Skip:
    """Something that is no image and claims to be none, such as a member `x.cls` of a tar; counted only."""


Entry = Item | Reject | Skip


class Part(ABC):
    """One source, opened in one format.

    Its entries are the same at every reading as long as `identity` is the same.
    """

    path: str
    passed_over = 0
    """Files that are no entries, for they are no images, where `identity` has met any."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the entries are a function of, as JSON values. Contents of single image files are not part."""

    @abstractmethod
    def entries(self, start: int) -> Iterator[Entry]:
        """The entries from number `start` on, counted from 0.

        Raises:
            DataError: the source cannot be read.
        """

    @abstractmethod
    def share(self) -> float:
        """How much of the source was read, 0 .. 1, for the progress bar."""


def checked_label(label: object) -> str:
    """The label, if it can be one.

    Raises:
        Refused: it is no text, was not UTF-8, or holds a control character.
    """
    if not isinstance(label, str):
        raise Refused("label is not text", type(label).__name__)
    if not label.isprintable():
        kinds = {unicodedata.category(character) for character in label}
        if "Cs" in kinds:
            raise Refused("not UTF-8", label)
        if not kinds.isdisjoint(_BREAKS_TEXT):
            raise Refused("control character in the label", label)
    return label
