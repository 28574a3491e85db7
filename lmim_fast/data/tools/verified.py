"""What `lmim data verify` found, and its two files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmim_fast.data.skip_list import skip_list_text


class Bad(NamedTuple):
    """A record that training would replace, or a label that cannot be read."""

    record: int
    """Its index in the store."""
    reason: str


@dataclass(frozen=True)
class Verified:
    """What was found in all records of a store."""

    databases: list[dict[str, Any]]
    """path, name, hash, records, bad, labels (whether it has any) of each."""
    records: int
    max_pixels: int
    bad: list[Bad]
    """Ascending by index; the reasons are those of bad_records.jsonl."""
    bad_labels: list[Bad]
    """Of the databases that have labels."""
    seconds: float

    @property
    def kinds(self) -> dict[str, int]:
        """Reason -> broken records, most frequent first."""
        return dict(Counter(bad.reason for bad in self.bad).most_common())

    @property
    def label_kinds(self) -> dict[str, int]:
        """Fault -> labels."""
        return dict(Counter(bad.reason for bad in self.bad_labels).most_common())

    def locate(self, index: int) -> tuple[dict[str, Any], str]:
        """The database of a record, and its image key."""
        for database in self.databases:
            if index < database["records"]:
                return database, f"image-{index + 1:09d}"
            index -= database["records"]
        raise IndexError(index)

    def as_json(self) -> dict[str, Any]:
        """verify.json."""
        return {
            "format": 1,
            "records": self.records,
            "bad": len(self.bad),
            "kinds": self.kinds,
            "label_kinds": self.label_kinds,
            "databases": self.databases,
            "max_pixels": self.max_pixels,
            "seconds": round(self.seconds, 3),
            "records_per_second": round(self.records / max(self.seconds, 1e-9), 1),
            "bad_records": self._named(self.bad),
            "bad_labels": self._named(self.bad_labels),
        }

    def skip_list(self, *, labels: bool) -> str:
        """skip.txt: broken records, and with `labels` those whose label cannot be read."""
        listed = {bad.record: bad.reason for bad in (self.bad_labels if labels else [])}
        listed |= {bad.record: bad.reason for bad in self.bad}
        places = [(self.locate(index), reason) for index, reason in sorted(listed.items())]
        return skip_list_text((at["name"], at["hash"], key, reason) for (at, key), reason in places)

    def _named(self, records: Sequence[Bad]) -> list[dict[str, str]]:
        places = [(*self.locate(bad.record), bad.reason) for bad in records]
        return [{"database": at["path"], "key": key, "reason": reason} for at, key, reason in places]
