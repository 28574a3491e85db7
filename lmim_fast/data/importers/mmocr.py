"""MMOCR's recognition annotations: one JSON object with a `data_list`, or a JSON object a line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

from lmim_fast.config.collections import ImportConfig
from lmim_fast.data.importers.entries import Entry, Reject
from lmim_fast.data.importers.json_stream import elements
from lmim_fast.data.importers.lists import ListPart
from lmim_fast.data.visible import visible
from lmim_fast.errors import DataError

_BEGINNING = 2**16  # bytes that decide which of the two it is


class Mmocr(ListPart):
    """`{"data_list": [{"img_path": ..., "instances": [{"text": ...}]}]}`, or lines
    `{"filename": ..., "text": ...}`.
    """

    def __init__(self, path: str, config: ImportConfig) -> None:
        super().__init__(path, config)
        with open(path, "rb") as file:
            beginning = file.read(_BEGINNING)
        self._is_lines = is_json_line(beginning)

    def _all_entries(self) -> Iterator[Entry]:
        yield from self._from_lines() if self._is_lines else self._from_object()

    def _from_lines(self) -> Iterator[Entry]:
        for line in self.lines():
            where = self.where(line.number)
            if line.text is None:
                yield Reject(where, line.reason)
                continue
            try:
                value = json.loads(line.text)
            except (ValueError, RecursionError) as error:
                yield Reject(where, "not JSON", str(error).partition(":")[0])
                continue
            yield self._entry(where, value)

    def _from_object(self) -> Iterator[Entry]:
        name = visible(self.path)
        try:
            with open(self.path, "rb") as binary:
                # Surrogates are refused where they matter, with the record's number.
                file = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape")
                for number, value in enumerate(elements(file, name, "data_list")):
                    self._passed = binary.tell()
                    yield self._entry(f"{self.path} data_list[{number}]", value)
        except OSError as error:
            raise DataError(f"{name} cannot be read ({error.strerror})") from error

    def _entry(self, where: str, value: object) -> Entry:
        if not isinstance(value, dict):
            return Reject(where, "not a JSON object", type(value).__name__)
        name = value.get("img_path", value.get("filename"))
        if "instances" not in value:
            return self.item(where, name, value.get("text"))
        instances = value["instances"]
        if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
            count = len(instances) if isinstance(instances, list) else 0
            return Reject(where, "not one instance", f"{count} instances; recognition data has one an image")
        if "bbox" in instances[0] or "polygon" in instances[0]:
            return Reject(where, "an instance with a box", "recognition data has none: its images are crops")
        return self.item(where, name, instances[0].get("text"))


def is_json_line(beginning: bytes) -> bool:
    """Whether a file that begins so has an object with an image's path in its first line."""
    line = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0]
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not {"filename", "img_path"}.isdisjoint(value)
