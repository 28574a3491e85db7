"""PaddleOCR's lists: `path<TAB>label` for recognition, `path<TAB>[boxes as JSON]` for detection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from lmim_fast.config.collections import ImportConfig
from lmim_fast.data.importers.entries import Box, Entry, Item, Refused, Reject, checked_label
from lmim_fast.data.importers.lists import ListPart

IGNORED = ("###", "*")
"""Transcriptions of boxes that nobody can read, as PaddleOCR has them."""
_LINES_TO_DECIDE = 100


class PaddleOcr(ListPart):
    """Which of the two kinds a list is, its first lines say: those of a detection list hold a JSON list.

    A recognition line may name several images, `["a.jpg", "b.jpg"]`; each is a record with the line's label.
    """

    def __init__(self, path: str, config: ImportConfig) -> None:
        super().__init__(path, config)
        texts = [line.text for line in islice(self.lines(), _LINES_TO_DECIDE) if line.text is not None]
        self.is_detection = is_detection(texts)

    def _all_entries(self) -> Iterator[Entry]:
        for line in self.lines():
            where = self.where(line.number)
            if line.text is None:
                yield Reject(where, line.reason)
                continue
            name, tab, text = line.text.partition("\t")
            if not tab:
                yield Reject(where, "no tab in the line", line.text[:200])
            elif self.is_detection:
                yield self._page(where, name, text)
            else:
                for one in _names(name):
                    yield self.item(where, one, text)

    def _page(self, where: str, name: str, text: str) -> Entry:
        entry = self.item(where, name, None)
        if isinstance(entry, Reject):
            return entry
        assert isinstance(entry, Item)
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            return Reject(where, "boxes are not JSON", str(error).partition(":")[0])
        if not isinstance(values, list):
            return Reject(where, "boxes are not a list", type(values).__name__)
        boxes, rejects, ignored = [], [], 0
        for number, value in enumerate(values):
            if isinstance(value, dict) and value.get("transcription") in IGNORED:
                ignored += 1
                continue
            try:
                boxes.append(_box(value))
            except Refused as refused:
                rejects.append(Reject(f"{entry.where} box {number}", refused.reason, refused.detail))
        return Item(entry.where, entry.read, None, tuple(boxes), ignored, tuple(rejects))


def _names(name: str) -> list[str]:
    """The images of a recognition line."""
    if name.startswith("["):
        try:
            names = json.loads(name)
        except (ValueError, RecursionError):
            return [name]
        if isinstance(names, list) and names and all(isinstance(one, str) for one in names):
            return names
    return [name]


def _box(value: object) -> Box:
    if not isinstance(value, dict):
        raise Refused("box is not a JSON object", type(value).__name__)
    points = value.get("points")
    if not isinstance(points, list) or not all(map(_is_point, points)):
        raise Refused("box without points [[x, y], ...]", str(points)[:100])
    if len(points) < 4:
        raise Refused("box of less than four points", str(len(points)))
    return Box(tuple((float(x), float(y)) for x, y in points), checked_label(value.get("transcription")))


def _is_point(point: Any) -> bool:
    return (
        isinstance(point, list)
        and len(point) == 2
        and all(isinstance(c, int | float) and abs(c) < 1e6 for c in point)  # NaN is not less
    )


def is_detection(texts: list[str]) -> bool:
    """Whether lines are those of a detection list: one has boxes as JSON after its tab, or all have `[]`.

    Other lines of such a list are damaged: a label that looks like boxes is less likely.
    """
    rests = [text.partition("\t")[2] for text in texts]
    return any(map(_has_boxes, rests)) or (bool(rests) and all(rest == "[]" for rest in rests))


def _has_boxes(text: str) -> bool:
    if not text.startswith("["):
        return False
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, list) and any(isinstance(value, dict) and "points" in value for value in values)
