"""Training labels: read once, fitted to the character set, counted; the records that are left to train on."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lmim_fast.config.finetune import LabelConfig
from lmim_fast.data.charset import Charset
from lmim_fast.data.normalize import normalize_label
from lmim_fast.data.store.databases import find_databases
from lmim_fast.data.store.gather import Gathered
from lmim_fast.data.store.records import Database, Record, Records
from lmim_fast.errors import DataError, UsageError

Kind = Literal["missing", "empty", "too_long", "outside", "normalized"]

EXAMPLES = 5  # of each kind
_BLOCK = 4096  # labels read at a time
_SHOWN = 60  # characters of a label in a message


class Example(NamedTuple):
    """One label that did not fit as it is."""

    database: str
    key: str
    label: str
    problem: str


class LabelTable:
    """Tokens of all labels of a store that can be trained on, 2 bytes each.

    A label is normalised to the set (`normalize_label`), then what `config` says happens to characters
    outside the set, then to what is still too long. Records without a label, or with an empty one, are left
    out.

    Args:
        store:      records; every label is read.
        charset:    classes.
        config:     what becomes of labels that do not fit.
        max_length: T, tokens of a target, EOS included; >= 2.
    Raises:
        DataError:  no record has a label, or none is left; the message has the counts.
        UsageError: more classes than 16 bits hold.
        ValueError: max_length < 2.
    """

    def __init__(self, store: Records, charset: Charset, config: LabelConfig, max_length: int) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be >= 2 (a character and EOS), got {max_length}")
        if charset.classes > 2**16:
            raise UsageError(f"a character set may have {2**16} classes at most, got {charset.classes}")
        self.charset, self.config, self.max_length = charset, config, max_length
        self.records = len(store)
        """Records of the store."""
        self.counts: Counter[Kind] = Counter()
        """Labels by what was special about them; one label may count in several kinds."""
        self.examples: dict[Kind, list[Example]] = {}
        """The first 5 of each kind."""
        self._read(store)
        if self.counts["missing"] == self.records:
            paths = ", ".join(database.path for database in store.databases[:3])
            more = ", ..." if len(store.databases) > 3 else ""
            raise DataError(
                f"none of {self.records} records has a label ({paths}{more}); fine-tuning needs the keys"
                " label-000000001, ..."
            )
        if not len(self.kept):
            raise DataError(f"no record is left to train on: {', '.join(self._summary())}")

    def __len__(self) -> int:
        return len(self.kept)

    def targets(self, records: Sequence[int]) -> torch.Tensor:
        """(B, T) int64 classes of kept records, by their numbers in the store: characters, EOS, then PAD.

        Raises:
            IndexError: a record that is not kept.
        """
        asked = np.asarray(records, dtype=np.int64).reshape(-1)
        rows = np.minimum(np.searchsorted(self.kept, asked), len(self.kept) - 1)
        if (strange := asked[self.kept[rows] != asked]).size:
            raise IndexError(f"record {strange[0]} is not among the {len(self.kept)} with a usable label")
        starts = self._offsets[rows]
        lengths = self._offsets[rows + 1] - starts
        places = np.arange(self.max_length)
        inside = places < lengths[:, None]
        targets = np.full(inside.shape, self.charset.pad, dtype=np.int64)
        targets[inside] = self._tokens[(starts[:, None] + places)[inside]]
        targets[np.arange(len(asked)), lengths] = self.charset.eos
        return torch.from_numpy(targets)

    def report_lines(self) -> list[str]:
        """What there is, what was left out or changed, and the examples: for people, before training."""
        lines = [f"labels: {len(self.kept):,} of {self.records:,} records are trained on"]
        for line, kind in zip(self._summary(), self.counts, strict=True):
            lines.append(f"  {line}")
            lines += [
                f"    {database} {key}: {_shown(label)}: {problem}" if kind != "missing" else
                f"    {database} {key}"
                for database, key, label, problem in self.examples[kind]
            ]  # fmt: skip
        return lines

    def fingerprint(self) -> dict[str, Any]:
        """What makes the targets out of the labels, JSON-ready, and how many records are kept."""
        return {
            "charset": self.charset.fingerprint(),
            "max_length": self.max_length,
            **asdict(self.config),
            "kept": len(self.kept),
            "targets": self._digest(),
        }

    def _digest(self) -> str:
        """Of every kept record's number and classes, so that one changed label shows."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.kept, self._offsets, self._tokens):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def _read(self, store: Records) -> None:
        kept, tokens, offsets = array("q"), array("H"), array("q", [0])
        for start in range(0, self.records, _BLOCK):
            numbers = range(start, min(start + _BLOCK, self.records))
            for number, label in zip(numbers, store.labels(numbers), strict=True):
                encoded = self._encode(store, number, label)
                if encoded:
                    kept.append(number)
                    tokens.extend(encoded)
                    offsets.append(len(tokens))
        self.kept: NDArray[np.int64] = np.frombuffer(kept, np.int64) if kept else np.empty(0, np.int64)
        """Numbers of the records with a usable label, ascending."""
        self._tokens = np.frombuffer(tokens, np.uint16) if tokens else np.empty(0, np.uint16)
        self._offsets = np.frombuffer(offsets, np.int64)

    def _encode(self, store: Records, number: int, label: str | None) -> list[int]:
        """Classes of the label without EOS; empty: the record is left out."""
        if label is None:
            self._note(store, number, "missing", "", "no label")
            return []
        charset, limit = self.charset, self.max_length - 1
        classes = charset.encode(label)
        if 0 < len(classes) <= limit and charset.unknown not in classes:
            return classes
        text = normalize_label(label, charset)
        if text != label:
            self._note(store, number, "normalized", label, f"read as {_shown(text)}")
        if outside := charset.outside(text):
            shown = "".join(dict.fromkeys(outside))
            self._note(store, number, "outside", label, f"{_shown(shown)} not in the character set")
            if self.config.outside == "leave_out":
                return []
            if self.config.outside == "delete":
                text = "".join(c for c in text if c not in outside)
        if not text:
            self._note(store, number, "empty", label, "no characters")
        elif len(text) > limit:
            self._note(store, number, "too_long", label, f"{len(text)} characters, more than {limit}")
            text = text[:limit] if self.config.too_long == "cut" else ""
        return charset.encode(text)

    def _note(self, store: Records, number: int, kind: Kind, label: str, problem: str) -> None:
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(Example(*store.locate(number), label, problem))

    def _summary(self) -> list[str]:
        """One phrase for each kind that occurs."""
        limit = self.max_length - 1
        outside = {
            "unknown": "read as the class for unknown characters",
            "leave_out": "left out",
            "delete": "such characters deleted",
        }
        long = {"cut": f"cut to {limit}", "leave_out": "left out"}
        phrases: dict[Kind, str] = {
            "missing": "without a label: left out",
            "empty": "with an empty label: left out",
            "too_long": f"of more than {limit} characters: {long[self.config.too_long]}",
            "outside": f"with characters outside the set: {outside[self.config.outside]}",
            "normalized": "written in equivalent characters of the set",
        }
        return [f"{count:,} {phrases[kind]}" for kind, count in self.counts.items()]


@dataclass(frozen=True)
class LabelledRecords:
    """The records of a store whose labels can be trained on, numbered 0 .. len - 1 in the store's order.

    Args:
        store: all records.
        table: of the store's labels.
    """

    store: Records
    table: LabelTable

    def __post_init__(self) -> None:
        if self.table.records != len(self.store):
            raise ValueError(f"the table is of {self.table.records} records, the store has {len(self.store)}")

    @property
    def databases(self) -> tuple[Database, ...]:
        """The store's folders, with the counts and numbers of the kept records; a count may be 0."""
        ends = [database.first_index + database.count for database in self.store.databases]
        edges = np.searchsorted(self.table.kept, [0, *ends]).tolist()
        return tuple(
            replace(database, first_index=first, count=end - first)
            for database, first, end in zip(self.store.databases, edges, edges[1:], strict=False)
        )

    @property
    def max_pixels(self) -> int:
        """The store's."""
        return self.store.max_pixels

    def __len__(self) -> int:
        return len(self.table)

    def record(self, index: int) -> Record:
        """The record at `index`, which is its number here; IndexError outside 0 .. len - 1."""
        return replace(self.store.record(self._numbers([index])[0]), index=int(index))

    def images(self, indices: Sequence[int]) -> list[bytes]:
        """See `RecordStore.images`."""
        return self.store.images(self._numbers(indices))

    def gather(
        self, indices: Sequence[int] | NDArray[np.int64], max_pixels: int, workers: Any = None
    ) -> Gathered:
        """See `RecordStore.gather`."""
        return self.store.gather(self._numbers(indices), max_pixels, workers)

    def label(self, index: int) -> str | None:
        """The label as it is written in the database."""
        return self.store.label(self._numbers([index])[0])

    def labels(self, indices: Sequence[int]) -> list[str | None]:
        """Labels as they are written in the databases, in the order of `indices`."""
        return self.store.labels(self._numbers(indices))

    def targets(self, indices: Sequence[int]) -> torch.Tensor:
        """(B, T) int64 classes in the order of `indices`; see `LabelTable.targets`."""
        return self.table.targets(self._numbers(indices))

    def locate(self, index: int) -> tuple[str, str]:
        """Database path and image key of `index`."""
        return self.store.locate(self._numbers([index])[0])

    def indices_of(self, which: int, numbers: Sequence[int]) -> list[int | None]:
        """See `RecordStore.indices_of`; None also for a record whose label is not trained on."""
        places = self.store.indices_of(which, numbers)
        asked = np.array([-1 if place is None else place for place in places], dtype=np.int64)
        rows = np.minimum(np.searchsorted(self.table.kept, asked), len(self) - 1)
        kept = self.table.kept[rows] == asked
        return [row if there else None for row, there in zip(rows.tolist(), kept.tolist(), strict=True)]

    def fingerprint(self) -> dict[str, Any]:
        """The store's, with what makes targets out of labels under `labels`."""
        return {**self.store.fingerprint(), "count": len(self), "labels": self.table.fingerprint()}

    def close(self) -> None:
        """Close this process's databases; a later read opens them again."""
        self.store.close()

    def groups(self, paths: Sequence[str | Path]) -> list[tuple[int, int]]:
        """First index and count of the kept records of each path that the store was made of.

        Raises:
            DataError:  a path none of whose records is kept, or without a database.
            UsageError: a path whose databases are not this store's, one after another.
        """
        by_path = {database.path: database for database in self.databases}
        groups = []
        for path in paths:
            folders = find_databases([path])
            if strange := [folder for folder in folders if folder not in by_path]:
                raise UsageError(f"{path}: {strange[0]} is not among the databases of this run")
            databases = [by_path[folder] for folder in folders]
            first, count = databases[0].first_index, sum(database.count for database in databases)
            if databases[-1].first_index + databases[-1].count != first + count:
                raise UsageError(f"{path}: its databases are not neighbours in this run; name it as data")
            if not count:
                raise DataError(f"{path}: none of its records has a usable label; leave the path out")
            groups.append((first, count))
        return groups

    def _numbers(self, indices: Sequence[int] | NDArray[np.int64]) -> list[int]:
        """Record numbers in the store."""
        asked = np.asarray(indices, dtype=np.int64).reshape(-1)
        if (strange := asked[(asked < 0) | (asked >= len(self))]).size:
            raise IndexError(f"record index {strange[0]} is outside 0 .. {len(self) - 1}")
        return self.table.kept[asked].tolist()


def _shown(text: str) -> str:
    """The text in quotes, control characters escaped, long ones cut short."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
