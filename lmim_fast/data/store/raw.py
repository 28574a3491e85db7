"""All records of a database as they are stored: for copies, which must not change a byte."""

from __future__ import annotations

from collections.abc import Iterator

from lmim_fast.data.store.databases import Database, damage, image_key, label_key, lmdb, open_environment

RawRecord = tuple[bytes | None, bytes | None]


def raw_records(database: Database) -> Iterator[RawRecord]:
    """Image and label bytes of every record in order, None for what is absent.

    Raises:
        DataError: the database is damaged.
    """
    environment = open_environment(database.path)
    number = 0
    try:
        with environment.begin() as transaction:
            for number in range(database.first_number, database.last_number + 1):
                yield transaction.get(image_key(number)), transaction.get(label_key(number))
    except lmdb.Error as error:
        raise damage(database.path, f"record {number}", error) from error
