"""`lmim data split`: every record into one of several LMDBs."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from lmim_fast.config.collections import SplitConfig
from lmim_fast.data.progress import progress_bar
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.store.writer import LmdbWriter, check_output_is_free
from lmim_fast.data.visible import visible
from lmim_fast.errors import DataError

_SHOWN_EVERY = 1000  # records between two looks at the bar


def split(config: SplitConfig) -> list[str]:
    """Write an LMDB for each part and say how many records it got; their order stays.

    By hash, the part of a record is a function of its image bytes and the seed: equal images are in one part,
    in every database that is split with the same seed and parts. Records without an image are left out.

    Raises:
        UsageError: the output is not free or cannot be made.
        DataError:  a database cannot be read, or a part would hold no record; then none is written.
        LmimError:  a write failed; the command starts anew.
    """
    output = Path(os.path.abspath(config.output))
    shares = config.shares()
    _check_output(output, shares)
    store = RecordStore(config.paths)
    part_of = _by_hash(config, shares) if config.by == "hash" else _at_random(config, shares, len(store))
    empty = 0
    try:
        with contextlib.ExitStack() as stack:
            advance = stack.enter_context(progress_bar("Splitting"))
            writers = [stack.enter_context(LmdbWriter(output / name, len(store))) for name in shares]
            for which, database in enumerate(store.databases):
                records = store.raw_records(which)
                for number, (image, label) in enumerate(records, database.first_index):
                    if number % _SHOWN_EVERY == 0:
                        advance(number / len(store), number)
                    if image:
                        writers[part_of(number, image)].put(image, label)
                    else:
                        empty += 1
            for name, writer in zip(shares, writers, strict=True):
                if not writer.written:
                    raise DataError(
                        f"part {name} would hold none of {len(store)} records; give it a larger share"
                        " or another --seed"
                    )
            for writer in writers:  # all, before the first one appears
                writer.flush()
    finally:
        store.close()
        with contextlib.suppress(OSError):  # it is empty after a failure, and stays otherwise
            output.rmdir()
    total = sum(writer.written for writer in writers)
    lines = [
        f"{writer.written:,} records ({100 * writer.written / total:.4g} %) in {visible(str(writer.output))}"
        for writer in writers
    ]
    return [*lines, *([f"  {empty:,} without an image left out"] if empty else [])]


def _check_output(output: Path, names: Iterable[str]) -> None:
    """Refuse a folder that is not free, but for what a killed split of these parts left in it."""
    left = {f"{name}.partial" for name in names}
    if not output.is_dir() or not left.issuperset(os.listdir(output)):
        check_output_is_free(output)


PartOf = Callable[[int, bytes], int]


def _by_hash(config: SplitConfig, shares: dict[str, float]) -> PartOf:
    bounds = _bounds(shares)
    key = config.seed.to_bytes(8, "little")

    def part_of(number: int, image: bytes) -> int:
        digest = hashlib.blake2b(image, digest_size=8, key=key).digest()
        return bisect.bisect_right(bounds, int.from_bytes(digest, "little") / 2**64)

    return part_of


def _at_random(config: SplitConfig, shares: dict[str, float], count: int) -> PartOf:
    """Each part has its share of the records with the lowest hashes of their numbers, and so on."""
    key = config.seed.to_bytes(8, "little")
    hashes = np.fromiter(
        (
            int.from_bytes(
                hashlib.blake2b(n.to_bytes(8, "little"), digest_size=8, key=key).digest(), "little"
            )
            for n in range(count)
        ),
        np.uint64,
        count,
    )
    ends = [round(bound * count) for bound in _bounds(shares)]
    parts = np.empty(count, np.uint16)
    parts[np.argsort(hashes, kind="stable")] = np.searchsorted(ends, np.arange(count), side="right")
    return lambda number, image: int(parts[number])


def _bounds(shares: dict[str, float]) -> Sequence[float]:
    """Upper bounds of all parts but the last, in [0, 1]."""
    return list(itertools.accumulate(shares.values()))[:-1]
