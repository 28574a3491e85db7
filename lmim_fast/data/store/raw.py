"""All records of a database as they are stored: for copies, which must not change a byte."""

from __future__ import annotations

from collections.abc import Iterator

from lmim_fast.data.store.databases import Database, image_key, label_key, open_environment
from lmim_fast.data.store.snapshots import read_values

_TOGETHER = 64  # records in memory

RawRecord = tuple[bytes | None, bytes | None]


def raw_records(database: Database) -> Iterator[RawRecord]:
    """Image and label bytes of every record in order, None for what is absent.

    Raises:
        DataError: the database is damaged.
    """
    environment = open_environment(database.path)
    numbers = range(database.first_number, database.last_number + 1)
    for start in range(0, len(numbers), _TOGETHER):
        some = numbers[start : start + _TOGETHER]
        keys = [key for number in some for key in (image_key(number), label_key(number))]
        values = read_values(database.path, environment, keys)
        yield from zip(values, values, strict=True)  # image and label take turns
