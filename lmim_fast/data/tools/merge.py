"""`lmim data merge`: several LMDBs as one, without exact duplicates if asked."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lmim_fast.config.collections import MergeConfig
from lmim_fast.data.progress import progress_bar
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.store.writer import LmdbWriter, check_output_is_free
from lmim_fast.data.visible import visible
from lmim_fast.errors import DataError

_SHOWN_EVERY = 1000  # records between two looks at the bar


def merge(config: MergeConfig) -> list[str]:
    """Copy all records, in the order given, and say how many.

    Records without image bytes are left out. To drop duplicates, 16 bytes of hash a record are kept in memory
    (about 100 bytes in Python: 1 GB for ten million).

    Raises:
        UsageError: the output exists or cannot be made.
        DataError:  a database cannot be read, or no record has an image.
        LmimError:  a write failed; nothing is kept, and the command starts anew.
    """
    output = Path(os.path.abspath(config.output))
    check_output_is_free(output)
    store = RecordStore(config.paths)
    seen: set[bytes] = set()
    empty = duplicates = 0
    try:
        with LmdbWriter(output, len(store)) as writer, progress_bar("Merging") as advance:
            for which, database in enumerate(store.databases):
                records = store.raw_records(which)
                for number, (image, label) in enumerate(records, database.first_index):
                    if number % _SHOWN_EVERY == 0:
                        advance(number / len(store), number)
                    if not image:
                        empty += 1
                        continue
                    if config.dedupe != "none":
                        key = _key(image, label if config.dedupe == "pair" else None)
                        if key in seen:
                            duplicates += 1
                            continue
                        seen.add(key)
                    writer.put(image, label)
            if not writer.written:
                raise DataError(f"none of {len(store)} records has an image")
    finally:
        store.close()
    count = len(store.databases)
    lines = [f"{writer.written:,} records of {count} database{'s' * (count > 1)} in {visible(str(output))}"]
    if config.dedupe != "none":
        lines.append(f"  {duplicates:,} duplicates left out (same {_SAME[config.dedupe]})")
    if empty:
        lines.append(f"  {empty:,} without an image left out")
    return lines


_SAME = {"image": "image", "pair": "image and label"}


def _key(image: bytes, label: bytes | None) -> bytes:
    """Hash of a record; the two lengths of hash keep image and label apart."""
    digest = hashlib.blake2b(image, digest_size=16)
    if label is not None:
        digest = hashlib.blake2b(digest.digest() + label, digest_size=16)
    return digest.digest()
