"""`lmim data import`: sources in, one LMDB out; parallel, in a fixed order, and resumable."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from lmim_fast import faults
from lmim_fast.config.collections import ImportConfig
from lmim_fast.data.importers.entries import Entry, Item, Part
from lmim_fast.data.importers.formats import open_sources
from lmim_fast.data.importers.prepare import BYTES_AT_ONCE, Outcome, Preparer
from lmim_fast.data.importers.summary import (
    REJECTS_FILE,
    SUMMARY_FILE,
    RejectList,
    Summary,
    first_reject,
    write_summary,
)
from lmim_fast.data.progress import progress_bar
from lmim_fast.data.store.resumable import ResumableWriter
from lmim_fast.data.store.writer import check_output_is_free
from lmim_fast.data.visible import visible
from lmim_fast.errors import DataError

_CHUNK = 256
_CHUNKS_AHEAD = 2  # tasks in flight for each thread: its results wait while records are committed
_MOST_WORKERS = 16
_SHOWN_EVERY = 500  # entries between two looks at the bar
# What the records depend on beside the sources.
_OPTIONS = (
    "label_from",
    "sort",
    "separator",
    "path_column",
    "label_column",
    "turn_vertical",
    "apply_exif",
    "keep_broken",
)
_RULES = 1  # raised when equal sources would give other records than before


def import_crops(config: ImportConfig) -> list[str]:
    """Import and say what was done; what was chosen is printed at once.

    Record k is the same for any number of workers, and however often the import was interrupted: records,
    rejects and the place in the sources are committed together, and the same command goes on from there.

    Returns:
        The lines of the summary.
    Raises:
        UsageError: see `open_sources` and `ResumableWriter`.
        DataError:  a source cannot be read, or gives no record.
        LmimError:  a write failed.
    """
    faults.arm_from_environment()
    output = Path(os.path.abspath(config.output))
    check_output_is_free(output)
    sources = open_sources(config)
    for part, name, why in sources:
        print(visible(f"{part.path}: read as {name} ({why})"), flush=True)
    identity = {
        "sources": [
            {"name": os.path.basename(os.path.abspath(part.path)), "format": name, **part.identity()}
            for part, name, _ in sources
        ],
        **{name: getattr(config, name) for name in _OPTIONS},
        "rules": _RULES,
    }
    writer = ResumableWriter(
        output, identity, restart=config.restart, side_files=(REJECTS_FILE, SUMMARY_FILE)
    )
    began = time.monotonic()
    before = -1
    try:
        with writer:
            before = writer.written
            if not writer.complete:
                _write(config, [part for part, _, _ in sources], identity, writer)
    except KeyboardInterrupt:
        print(f"interrupted: {writer.kept()}", file=sys.stderr)
        raise
    seconds = time.monotonic() - began
    lines = Summary.from_file(output / SUMMARY_FILE).report_lines(output)
    return [*lines, f"  {seconds:.1f} s, {(writer.written - before) / seconds:,.0f} records/s"]


def _write(
    config: ImportConfig, parts: Sequence[Part], identity: dict[str, Any], writer: ResumableWriter
) -> None:
    """All records that are not there yet, and the side files."""
    summary = Summary.from_state(writer.state)
    begun_with = summary.records
    if begun_with:
        print(f"continuing behind {begun_with:,} records", flush=True)
    prepare = Preparer(config.turn_vertical, config.apply_exif, config.keep_broken)
    workers = config.workers or min(_MOST_WORKERS, 2 * len(os.sched_getaffinity(0)))
    rejects = RejectList(writer.folder / REJECTS_FILE, summary.listed)
    with (
        contextlib.closing(rejects),
        progress_bar("Importing crops") as advance,
        _one_opencv_thread(),
        _pool(workers) as pool,
    ):

        def commit() -> None:
            summary.listed = rejects.sync()
            writer.commit(summary.state())

        def show() -> None:
            share = parts[summary.part].share() if summary.part < len(parts) else 0.0
            advance((summary.part + share) / len(parts), summary.records - begun_with)

        for number in range(summary.part, len(parts)):
            try:
                for outcome in _outcomes(
                    parts[number], summary.entry, prepare, pool, _CHUNKS_AHEAD * workers
                ):
                    summary.add(outcome)
                    rejects.add(outcome)
                    for image, label in outcome.records:
                        writer.put(image, label)
                    if writer.commit_is_due():
                        commit()
                    if summary.entry % _SHOWN_EVERY == 0:
                        show()
            except DataError as error:
                raise DataError(f"{error}; {writer.kept()}") from error
            summary.part, summary.entry = number + 1, 0
            commit()
    summary.counts["skipped"] += sum(part.passed_over for part in parts)
    if not summary.records:
        found = "; ".join(line.strip() for line in summary.count_lines())
        example = first_reject(writer.folder / REJECTS_FILE)
        raise DataError(
            f"no record was found: {found or 'no image and no line'}"
            + (f" (the first one: {example})" if example else "")
        )
    if not summary.rejected:
        (writer.folder / REJECTS_FILE).unlink()
    write_summary(writer.folder / SUMMARY_FILE, identity, summary)


def _outcomes(
    part: Part, start: int, prepare: Preparer, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Outcome]:
    """Outcomes of the entries from `start` on, in order; `ahead` tasks at a time are under way."""
    pending: deque[tuple[list[Entry], Future[list[Outcome]]]] = deque()
    size = _Size()

    def finished() -> list[Outcome]:
        chunk, future = pending.popleft()
        outcomes = future.result()
        size.learn(outcomes)
        if rest := chunk[len(outcomes) :]:  # its images are larger than those before
            pending.appendleft((rest, pool.submit(prepare, rest)))
        return outcomes

    for chunk in _chunks(part.entries(start), size):
        while len(pending) >= ahead:
            yield from finished()
        pending.append((chunk, pool.submit(prepare, chunk)))
    while pending:
        yield from finished()


@dataclass
class _Size:
    """Bytes of an image, by the largest ones lately; it makes tasks as long as one can do."""

    bytes: int = 2**18

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        largest = max((outcome.read for outcome in outcomes), default=0)
        self.bytes = max(largest, self.bytes * 7 // 8)


def _chunks(entries: Iterator[Entry], size: _Size) -> Iterator[list[Entry]]:
    """Entries in order, a task's at a time; a page has one to itself. It changes no record."""
    chunk: list[Entry] = []
    held = 0
    for entry in entries:
        chunk.append(entry)
        is_page = isinstance(entry, Item) and entry.boxes is not None
        held += max(size.bytes, entry.size if isinstance(entry, Item) else 0)
        if is_page or held >= BYTES_AT_ONCE or len(chunk) == _CHUNK:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that end with the block, without the tasks that have not begun."""
    pool = ThreadPoolExecutor(workers, "lmim-import")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _one_opencv_thread() -> Iterator[None]:
    """OpenCV with one thread a call: the calls are what runs in parallel."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
