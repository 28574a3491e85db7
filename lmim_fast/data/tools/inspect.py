"""`lmim data inspect`: what LMDBs hold, and which records are broken, from a bounded sample of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmim_fast.config import MAX_PIXELS
from lmim_fast.data.console import SafeConsole
from lmim_fast.data.decoding import decode
from lmim_fast.data.png import still_png
from lmim_fast.data.samples import UNDECODABLE, reason_of
from lmim_fast.data.store.databases import Database
from lmim_fast.data.store.probe import Status, probe
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.tools.words import (
    PERCENTILES,
    character_class,
    format_of,
    percentile_text,
    share_text,
)
from lmim_fast.data.visible import visible

SAMPLE = 5000  # records per database that are decoded: a second or two
NAMED_BROKEN = 5  # broken records named in the table
_BLOCK = 256  # records in memory at a time
_LENGTH_BINS = ((0, 0), (1, 1), (2, 3), (4, 6), (7, 10), (11, 15), (16, 25), (26, None))


@dataclass(frozen=True)
class Broken:
    """One record that cannot be used."""

    key: str
    reason: str


@dataclass(frozen=True)
class Summary:
    """One database. All but `records` speaks of the `sampled` records, which are spread evenly over it."""

    path: str
    records: int
    sampled: int
    labelled: int
    formats: dict[str, int]
    """Format name to records, most frequent first; "other" for bytes that start like no known format."""
    heights: tuple[int, ...]
    """PERCENTILES of the pixel heights of the good records; empty without one."""
    widths: tuple[int, ...]
    """PERCENTILES of the pixel widths."""
    label_lengths: dict[int, int]
    """Characters of a label to records, ascending."""
    characters: dict[str, int]
    """Class of character to occurrences in labels, most frequent first."""
    distinct_characters: int
    broken: int
    """Records that fail the header check or do not decode."""
    broken_examples: tuple[Broken, ...]
    """The first NAMED_BROKEN of them."""


def inspect(
    paths: Sequence[str],
    *,
    sample: int = SAMPLE,
    max_pixels: int = MAX_PIXELS,
    console: Console | None = None,
) -> list[Summary]:
    """Look into LMDB folders (or folders that hold LMDBs at any depth) and print a table for each database.

    Args:
        paths:      as for `RecordStore`.
        sample:     records decoded per database, evenly spread; smaller databases are read completely.
        max_pixels: a record that claims more counts as broken and is not decoded.
        console:    where to print; None: standard output.
    Raises:
        DataError: a path without a database, or a database that cannot be read.
    """
    console = console or SafeConsole()
    store = RecordStore(paths, max_pixels=max_pixels)
    try:
        summaries = []
        for database in store.databases:
            summaries.append(summarize(store, database, sample))
            console.print(
                Text(visible(database.path), style="bold"), soft_wrap=True
            )  # one line, to be copied
            console.print(_table(summaries[-1]))
        if len(summaries) > 1:
            console.print(f"{len(summaries)} databases, {len(store):,} records")
        return summaries
    finally:
        store.close()


def summarize(
    store: RecordStore, database: Database, sample: int = SAMPLE, left_out: Container[int] = ()
) -> Summary:
    """Read up to `sample` evenly spread records of one of the store's databases.

    Args:
        left_out: records that are not read where they are among these.
    Raises:
        ValueError: sample is not positive.
        DataError:  the database is damaged.
    """
    if sample < 1:
        raise ValueError(f"sample must be >= 1, got {sample}")
    sampled = 0
    formats: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    characters: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    examples: list[Broken] = []
    broken = 0
    for block in _blocks(database, min(sample, database.count)):
        indices = [index for index in block if index not in left_out]
        sampled += len(indices)
        images = store.images(indices)
        for index, image, size, reason in zip(
            indices, images, *_verdicts(images, store.max_pixels), strict=True
        ):
            formats[format_of(image)] += 1
            label = store.label(index)
            if label is not None:
                lengths[len(label)] += 1
                characters.update(label)
            if reason is None:
                sizes.append(size)
                continue
            broken += 1
            if len(examples) < NAMED_BROKEN:
                examples.append(Broken(store.locate(index)[1], reason))
    classes: Counter[str] = Counter()
    for character, occurrences in characters.items():
        classes[character_class(character)] += occurrences
    heights, widths = _percentiles(sizes)
    return Summary(
        path=database.path,
        records=database.count,
        sampled=sampled,
        labelled=lengths.total(),
        formats=dict(formats.most_common()),
        heights=heights,
        widths=widths,
        label_lengths=dict(sorted(lengths.items())),
        characters=dict(classes.most_common()),
        distinct_characters=len(characters),
        broken=broken,
        broken_examples=tuple(examples),
    )


def _blocks(database: Database, sampled: int) -> Iterator[list[int]]:
    """Evenly spread record indices of a database, a block at a time."""
    for start in range(0, sampled, _BLOCK):
        steps = range(start, min(start + _BLOCK, sampled))
        yield [database.first_index + step * database.count // sampled for step in steps]


def _verdicts(images: Sequence[bytes], max_pixels: int) -> tuple[list[tuple[int, int]], list[str | None]]:
    """Size of each image, and why it cannot be used (None: it can)."""
    status, heights, widths = probe(images, max_pixels)
    reasons = [
        _undecodable(image) if verdict == Status.OK else reason_of(verdict, image)
        for image, verdict in zip(images, status, strict=True)
    ]
    return list(zip(heights.tolist(), widths.tolist(), strict=True)), reasons


def _undecodable(image: bytes) -> str | None:
    """Why OpenCV cannot decode an image with a good header; None when it can."""
    if still_png(image) is None:
        return UNDECODABLE
    return "does not decode" if decode(np.frombuffer(image, np.uint8)) is None else None


def _percentiles(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not sizes:
        return (), ()
    heights, widths = np.percentile(np.array(sizes), PERCENTILES, axis=0, method="nearest").T
    return tuple(heights.tolist()), tuple(widths.tolist())


def _table(summary: Summary) -> Table:
    """The summary for people. Keys and script names are data, not markup."""
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    complete = summary.sampled == summary.records
    how = "all read" if complete else f"{summary.sampled:,} read, evenly spread; the rest is about these"
    rows = [
        ("records", f"{summary.records:,} ({how})"),
        ("labelled", share_text(summary.labelled, summary.sampled)),
        (
            "formats",
            ", ".join(f"{name} {share_text(n, summary.sampled)}" for name, n in summary.formats.items()),
        ),
        ("height px", percentile_text(summary.heights)),
        ("width px", percentile_text(summary.widths)),
    ]
    if summary.labelled:
        total = sum(summary.characters.values())
        classes = ", ".join(f"{name} {100 * n / total:.1f} %" for name, n in summary.characters.items())
        lengths = np.repeat(list(summary.label_lengths), list(summary.label_lengths.values()))
        spread = np.percentile(lengths, PERCENTILES, method="nearest")
        rows += [
            ("label length", percentile_text(tuple(spread.tolist()))),
            ("", _histogram(summary.label_lengths)),
            ("characters", f"{summary.distinct_characters} distinct: {classes}"),
        ]
    rows.append(("broken", share_text(summary.broken, summary.sampled)))
    rows += [("", f"{example.key}: {example.reason}") for example in summary.broken_examples]
    unnamed = summary.broken - len(summary.broken_examples)
    if unnamed:
        rows.append(("", f"and {unnamed:,} more"))
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _histogram(lengths: dict[int, int]) -> str:
    """Bars over ranges of label lengths, those without a label left out."""
    counts = {
        (low, high): sum(
            n for length, n in lengths.items() if low <= length and (high is None or length <= high)
        )
        for low, high in _LENGTH_BINS
    }
    most = max(counts.values())
    lines = []
    for (low, high), count in counts.items():
        if count:
            name = str(low) if low == high else f"{low}-{high}" if high else f"{low}+"
            lines.append(f"{name:>6} {'█' * max(1, round(24 * count / most))} {count:,}")
    return "\n".join(lines)
