"""`lmim data verify`: every record decoded as training decodes it; broken ones counted, named and listed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from lmim_fast.config.tools import VerifyConfig
from lmim_fast.data.background import Background
from lmim_fast.data.dali import BrokenImages, DaliViews, Stage
from lmim_fast.data.samples import UNDECODABLE, decodable, reason_of
from lmim_fast.data.skip_list import skip_list_text
from lmim_fast.data.store.probe import Status
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.tools.files import require_new, write_whole
from lmim_fast.data.tools.progress import progress
from lmim_fast.data.tools.quiet import decoders_silenced
from lmim_fast.data.tools.verify_table import print_verified

REPORT, SKIP_LIST = "verify.json", "skip.txt"
_BLOCK = 256  # records read, and at most decoded, at once
_PIXELS_AT_ONCE = 2**26  # decoded at once, 200 MB; a larger image is decoded alone
_BLOCKS_AHEAD = 2

LabelFault = Literal["no label", "empty label", "label is not UTF-8"]


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


def verify(config: VerifyConfig, console: Console | None = None) -> Verified:
    """Decode every record under `config.paths`, print what is broken and write it into `config.output`.

    Broken is what training replaces: headers are probed, the rest goes through DALI's decoder. Memory is
    bounded, but for the list of what is broken.

    Args:
        console: where to print; None: standard output.
    Raises:
        UsageError: the output exists or cannot be written.
        DataError:  a path without a database, or a database that cannot be read.
    """
    output = None if config.output is None else Path(config.output)
    if output is not None:
        require_new(output, (REPORT, SKIP_LIST))
    store = RecordStore(config.paths, max_pixels=config.max_pixels)
    try:
        found = check_records(store, config.threads)
    finally:
        store.close()
    if output is not None:
        write_whole(output / SKIP_LIST, found.skip_list(labels=config.skip_labels).encode())
        write_whole(output / REPORT, json.dumps(found.as_json(), indent=1).encode())
    print_verified(found, output, console or Console())
    return found


def check_records(store: RecordStore, threads: int = 0) -> Verified:
    """Decode every record of a store.

    Args:
        threads: of the decoder; 0 takes the cores of this process.
    Raises:
        DataError: a database is damaged.
    """
    start = time.monotonic()
    bad: list[Bad] = []
    bad_labels: list[Bad] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(decoders_silenced())
        views = DaliViews(
            batch_size=_BLOCK,
            threads=threads or len(os.sched_getaffinity(0)),
            device=torch.device("cpu"),
            image_size=(1, 1),
            stage=Stage.DECODE,
        )
        stack.callback(views.close)
        blocks = Background(_blocks(store), _BLOCKS_AHEAD, "lmim-verify")
        stack.callback(blocks.close)
        advance = stack.enter_context(progress("Decoding records", len(store)))
        for block in blocks:
            bad += sorted([*block.bad, *_undecodable(block, views)])
            bad_labels += block.bad_labels
            advance(block.records)
    return Verified(
        databases=_described(store, bad),
        records=len(store),
        max_pixels=store.max_pixels,
        bad=bad,
        bad_labels=bad_labels,
        seconds=time.monotonic() - start,
    )


class _Block(NamedTuple):
    """Some records, read; those whose header is good are to be decoded."""

    records: int
    bad: list[Bad]
    bad_labels: list[Bad]
    indices: list[int]
    encoded: list[bytes]
    pixels: NDArray[np.int64]


def _blocks(store: RecordStore) -> Iterator[_Block]:
    for database in store.databases:
        end = database.first_index + database.count
        for start in range(database.first_index, end, _BLOCK):
            indices = range(start, min(start + _BLOCK, end))
            encoded, status, heights, widths = decodable(store.images(indices), store.max_pixels)
            faults = zip(indices, map(label_fault, store.label_bytes(indices)), strict=True)
            good = np.flatnonzero(status == Status.OK)
            yield _Block(
                len(indices),
                [Bad(indices[row], reason_of(status[row])) for row in np.flatnonzero(status != Status.OK)],
                [Bad(index, fault) for index, fault in faults if fault and database.has_labels],
                [indices[row] for row in good],
                [encoded[row] for row in good],
                heights[good].astype(np.int64) * widths[good],
            )


def label_fault(label: bytes | None) -> LabelFault | None:
    """What is wrong with a label; None: nothing."""
    if label is None:
        return "no label"
    if not label:
        return "empty label"
    try:
        label.decode()
    except UnicodeDecodeError:
        return "label is not UTF-8"
    return None


def _undecodable(block: _Block, views: DaliViews) -> Iterator[Bad]:
    """Images with a good header that the decoder refuses."""
    for rows in _within_memory(block.pixels):
        try:
            views([block.encoded[row] for row in rows], None)
        except BrokenImages as broken:  # these rows and no others
            yield from (Bad(block.indices[rows[row]], UNDECODABLE) for row in broken.rows)


def _within_memory(pixels: NDArray[np.int64]) -> Iterator[range]:
    """The rows, as many at a time as may be decoded at once."""
    start, held = 0, 0
    for row, size in enumerate(pixels.tolist()):
        if row > start and held + size > _PIXELS_AT_ONCE:
            yield range(start, row)
            start, held = row, 0
        held += size
    if start < len(pixels):
        yield range(start, len(pixels))


def _described(store: RecordStore, bad: Sequence[Bad]) -> list[dict[str, Any]]:
    indices = np.array([found.record for found in bad], dtype=np.int64)
    described = []
    for database, content in zip(store.databases, store.fingerprint()["databases"], strict=True):
        edges = [database.first_index, database.first_index + database.count]
        first, last = np.searchsorted(indices, edges).tolist()
        described.append(
            {
                "path": database.path,
                "name": content["name"],
                "hash": content["hash"],
                "records": database.count,
                "bad": last - first,
                "labels": database.has_labels,
            }
        )
    return described
