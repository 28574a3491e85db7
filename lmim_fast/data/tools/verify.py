"""`lmim data verify`: every record decoded as training decodes it; broken ones counted, named and listed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from lmim_fast.config.tools import VerifyConfig
from lmim_fast.data.background import Background
from lmim_fast.data.console import SafeConsole
from lmim_fast.data.dali import BrokenImages, DaliViews, Stage
from lmim_fast.data.progress import progress_bar
from lmim_fast.data.samples import UNDECODABLE, decodable, reason_of
from lmim_fast.data.store.probe import Status
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.tools.files import require_new, write_whole
from lmim_fast.data.tools.quiet import decoders_silenced
from lmim_fast.data.tools.verified import Bad, Verified
from lmim_fast.data.tools.verify_table import print_verified
from lmim_fast.data.visible import visible

REPORT, SKIP_LIST = "verify.json", "skip.txt"
_BLOCK = 256  # records read, and at most decoded, at once
_PIXELS_AT_ONCE = 2**26  # decoded at once, 200 MB; a larger image is decoded alone
_BLOCKS_AHEAD = 2

LabelFault = Literal["no label", "empty label", "label is not UTF-8"]


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
    console = console or SafeConsole()
    print_verified(found, console)  # first: a full disk should not cost what took hours
    if output is not None:
        write_whole(output / SKIP_LIST, found.skip_list(labels=config.skip_labels).encode())
        write_whole(output / REPORT, json.dumps(found.as_json(), indent=1).encode())
        console.print(Text(f"written: {visible(str(output))}/{REPORT}, {SKIP_LIST}"), soft_wrap=True)
    elif found.bad:
        console.print("--output DIR writes them as a skip list for --loader.skip")
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
    done = 0
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
        advance = stack.enter_context(progress_bar("Decoding records"))
        for block in blocks:
            bad += sorted([*block.bad, *_undecodable(block, views)])
            bad_labels += block.bad_labels
            done += block.records
            advance(done / len(store), done)
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
    encoded: list[NDArray[np.uint8]]
    pixels: NDArray[np.int64]


def _blocks(store: RecordStore) -> Iterator[_Block]:
    for database in store.databases:
        end = database.first_index + database.count
        for start in range(database.first_index, end, _BLOCK):
            indices = range(start, min(start + _BLOCK, end))
            images = decodable(store.gather(indices, store.max_pixels))
            status, encoded = images.status, images.encoded
            faults = zip(indices, map(label_fault, store.label_bytes(indices)), strict=True)
            good = np.flatnonzero(status == Status.OK).tolist()
            yield _Block(
                len(indices),
                [
                    Bad(indices[row], reason_of(status[row], encoded[row]))
                    for row in np.flatnonzero(status != Status.OK).tolist()
                ],
                [Bad(index, fault) for index, fault in faults if fault and database.has_labels],
                [indices[row] for row in good],
                [encoded[row] for row in good],
                images.heights[good].astype(np.int64) * images.widths[good],
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
