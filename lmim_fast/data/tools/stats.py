"""`lmim data stats`: sizes, formats, labels, characters, duplicates of all records, with histograms."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmim_fast.config.tools import StatsConfig
from lmim_fast.data.console import SafeConsole
from lmim_fast.data.progress import progress_bar
from lmim_fast.data.samples import reason_of
from lmim_fast.data.store.probe import Status, probe
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.tools.files import require_new, write_whole
from lmim_fast.data.tools.record_stats import Stats, percentiles
from lmim_fast.data.tools.stats_plots import histograms
from lmim_fast.data.tools.words import (
    format_of,
    percentile_text,
    share_text,
)
from lmim_fast.data.visible import visible

REPORT = "stats.json"
_BLOCK = 1024  # records in memory at a time
_TOP = 10  # characters named on the terminal


def stats(config: StatsConfig, console: Console | None = None) -> Stats:
    """Count all records under `config.paths`; print a table; with an output, write stats.json and histograms.

    Raises:
        UsageError: the output exists or cannot be written.
        DataError:  a path without a database, or a database that cannot be read.
    """
    output = None if config.output is None else Path(config.output)
    if output is not None:
        require_new(output, (REPORT,))
    store = RecordStore(config.paths, max_pixels=config.max_pixels)
    try:
        counted = count_records(store)
    finally:
        store.close()
    console = console or SafeConsole()
    console.print(_table(counted))
    if output is not None:
        pictures = histograms(counted)
        for name, picture in pictures.items():
            write_whole(output / name, picture)
        write_whole(output / REPORT, json.dumps(counted.as_json(), indent=1).encode())
        names = ", ".join([REPORT, *pictures])
        console.print(Text(f"written: {visible(str(output))}/{names}"), soft_wrap=True)
    return counted


def count_records(store: RecordStore) -> Stats:
    """Read all records of a store: headers and labels. Memory: about 40 bytes a record.

    Raises:
        DataError: a database is damaged.
    """
    formats: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    heights, widths, sizes, hashes, lengths = [], [], [], [], []
    with progress_bar("Counting records") as advance:
        for start in range(0, len(store), _BLOCK):
            indices = range(start, min(start + _BLOCK, len(store)))
            images = store.images(indices)
            status, height, width = probe(images, store.max_pixels)
            good = status == Status.OK
            heights.append(height[good])
            widths.append(width[good])
            sizes.append(np.array([len(image) for image in images], dtype=np.int64))
            hashes.append(np.array([_hash(image) for image in images if image], dtype=np.uint64))
            formats.update(format_of(image) for image in images if image)
            broken.update(reason_of(status[row], images[row]) for row in np.flatnonzero(~good).tolist())
            labels = [label for label in store.labels(indices) if label is not None]
            lengths.append(np.array([len(label) for label in labels], dtype=np.int32))
            characters.update("".join(labels))
            advance(indices.stop / len(store), indices.stop)
    return Stats(
        paths=tuple(database.path for database in store.databases),
        records=len(store),
        heights=np.concatenate(heights),
        widths=np.concatenate(widths),
        sizes=np.concatenate(sizes),
        formats=dict(formats.most_common()),
        broken=dict(broken.most_common()),
        label_lengths=np.concatenate(lengths),
        characters=dict(sorted(characters.items(), key=lambda item: (-item[1], item[0]))),
        distinct_images=len(np.unique(np.concatenate(hashes))),
    )


def _hash(image: bytes) -> int:
    # 64 bits: among 10 million different images two have the same with a chance of 3 in a million.
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little")


def _table(counted: Stats) -> Table:
    """For people. Characters and paths are data: escaped where they could steer a terminal."""
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    ratios = tuple(round(ratio, 2) for ratio in percentiles(counted.aspect_ratios))
    rows = [
        ("records", f"{counted.records:,} in {len(counted.paths)} databases"),
        ("formats", ", ".join(f"{n} {share_text(c, counted.records)}" for n, c in counted.formats.items())),
        ("height px", percentile_text(percentiles(counted.heights))),
        ("width px", percentile_text(percentiles(counted.widths))),
        ("width / height", percentile_text(ratios)),
        ("bytes", f"{percentile_text(percentiles(counted.sizes))}   sum {counted.sizes.sum():,}"),
        ("same image bytes", share_text(counted.duplicates, counted.records)),
        ("labelled", share_text(len(counted.label_lengths), counted.records)),
    ]
    if counted.characters:
        total = sum(counted.characters.values())
        classes = ", ".join(f"{name} {100 * n / total:.1f} %" for name, n in counted.classes.items())
        top = list(counted.characters.items())[:_TOP]
        rows += [
            ("label length", percentile_text(percentiles(counted.label_lengths))),
            ("characters", f"{len(counted.characters):,} distinct: {classes}"),
            ("most frequent", ", ".join(f"{_shown(c)} {100 * n / total:.1f} %" for c, n in top)),
        ]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counted.broken.items())
    bad = sum(counted.broken.values())
    rows.append(("broken headers", share_text(bad, counted.records) + (f": {reasons}" if bad else "")))
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _shown(character: str) -> str:
    return "space" if character == " " else visible(character)
