"""What an import has done so far: counted, committed with the records, told at the end."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lmim_fast import durable
from lmim_fast.data.importers.prepare import Outcome
from lmim_fast.data.visible import visible

REJECTS_FILE = "rejects.tsv"
SUMMARY_FILE = "import.json"
_REASONS_SHOWN = 8
_TOLD = ("records", "labelled", "counts", "rejected")


@dataclass
class Summary:
    """Counts of an import and its place in the sources.

    Args:
        part, entry: source, and number of the next entry in it.
        records:     written.
        labelled:    records with a label.
        counts:      cropped: records cut out of pages; ignored: boxes marked as unreadable; turned: vertical
            crops; upright: images turned as their EXIF orientation says; broken: kept though they cannot be
            used; skipped: files that are no images.
        rejected:    reason to number of entries or boxes.
        listed:      bytes of the list of rejects.
    """

    part: int = 0
    entry: int = 0
    records: int = 0
    labelled: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    listed: int = 0

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Summary:
        """As `state` gave it; from an empty one the beginning."""
        summary = cls(**state)
        summary.counts, summary.rejected = Counter(summary.counts), Counter(summary.rejected)
        return summary

    @classmethod
    def from_file(cls, path: Path) -> Summary:
        """As `write_summary` wrote it, without the place."""
        written = json.loads(path.read_text("utf-8"))
        return cls.from_state({name: written[name] for name in _TOLD})

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **vars(self),
            "counts": {name: self.counts[name] for name in sorted(self.counts) if self.counts[name]},
            "rejected": dict(sorted(self.rejected.items())),
        }

    def add(self, outcome: Outcome) -> None:
        """Count the outcome of the next entry."""
        self.entry += 1
        self.records += len(outcome.records)
        self.labelled += sum(label is not None for _, label in outcome.records)
        self.counts.update(outcome.counts)
        self.rejected.update(reject.reason for reject in outcome.rejects)

    def report_lines(self, output: Path) -> list[str]:
        """For people, once the database is there."""
        lines = [f"{self.records:,} records in {output}, {self.labelled:,} with a label", *self.count_lines()]
        if self.rejected:
            lines[-1] += f"; listed in {output / REJECTS_FILE}"
        return [visible(line) for line in lines]

    def count_lines(self) -> list[str]:
        """What was done and left out; the rejects come last."""
        counts, lines = self.counts, []
        told = {
            "cropped": "cut out of pages",
            "ignored": "boxes left out, marked as unreadable",
            "turned": "vertical crops turned by 90 degrees counter-clockwise (--no-turn-vertical keeps them)",
            "upright": "images turned as their EXIF orientation says (--no-apply-exif keeps them)",
            "broken": "kept though they cannot be used",
            "skipped": "other files passed over",
        }
        lines += [f"  {counts[name]:,} {text}" for name, text in told.items() if counts[name]]
        if self.rejected:
            reasons = [f"{number:,} {reason}" for reason, number in self.rejected.most_common(_REASONS_SHOWN)]
            more = len(self.rejected) - len(reasons)
            lines.append(
                f"  {self.rejected.total():,} rejected: {', '.join(reasons)}"
                + (f" and {more} more reasons" if more else "")
            )
        return lines


class RejectList:
    """`rejects.tsv`: where, reason, detail. It is cut back to what was committed when an import goes on.

    Args:
        path:   the file.
        listed: bytes of it that were committed.
    """

    def __init__(self, path: Path, listed: int) -> None:
        self._path = path
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115 - closed by `close`
        self._file.truncate(listed)
        if not listed:
            self._file.write(b"where\treason\tdetail\n")

    def add(self, outcome: Outcome) -> None:
        """Append the rejects of one entry."""
        for reject in outcome.rejects:
            fields = map(visible, (reject.where, reject.reason, reject.detail[:1000]))
            self._file.write("\t".join(fields).encode() + b"\n")

    def sync(self) -> int:
        """Bring it onto the disk; its size in bytes."""
        self._file.flush()
        durable.flush_file(self._file.fileno(), self._path)
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def first_reject(path: Path) -> str:
    """The first entry of a list of rejects, as a phrase; "" without one."""
    with open(path, encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in islice(file, 1, 2)]
    return ", ".join(field for field in lines[0].split("\t") if field) if lines else ""


def write_summary(path: Path, identity: dict[str, Any], summary: Summary) -> None:
    """`import.json`: what the database was made of, and the counts."""
    state = summary.state()
    text = json.dumps({**identity, **{name: state[name] for name in _TOLD}}, indent=1, ensure_ascii=False)
    durable.write_file(path, (text + "\n").encode())
