"""Reads of an LMDB in one of its states, without a lock: a writer knows of no reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

from lmim_fast.errors import DataError

try:
    import lmdb
except ImportError as error:  # a machine may have torch and nothing else
    raise ImportError("reading records needs lmdb: pip install lmdb") from error

__all__ = ["busy", "in_one_snapshot", "lmdb", "read_values"]

T = TypeVar("T")

_TRIES = 100  # of one key: no writer commits twice in each of so many microseconds
_TOGETHER = 256  # keys read before a look at the writer: the look costs as much as two of them


def in_one_snapshot(path: str, environment: lmdb.Environment, read: Callable[[lmdb.Transaction], T]) -> T:
    """What `read` returns for a state of the database that nobody wrote over meanwhile.

    Transaction n of a writer reuses no page of the two states before its own, so a state is whole until the
    second commit after it.

    Raises:
        DataError: the database is damaged, or written too fast for `read`.
    """
    for _ in range(_TRIES):
        try:
            if (found := _try(environment, read)) is not None:
                return found[0]
        except lmdb.Error as error:
            raise damage(path, "the database", error) from error
    raise busy(path, "it")


def read_values(path: str, environment: lmdb.Environment, keys: Sequence[bytes]) -> Iterator[bytes | None]:
    """The values of the keys, None where absent.

    Raises:
        DataError: a key's page is damaged, or written too fast to be read.
    """
    start, together, tries = 0, _TOGETHER, 0
    key = b""

    def values(transaction: lmdb.Transaction) -> list[bytes | None]:
        nonlocal key
        found: list[bytes | None] = []
        for key in keys[start : start + together]:
            found.append(cast("bytes | None", transaction.get(key)))
        return found

    while start < len(keys):
        try:
            found = _try(environment, values)
        except lmdb.Error as error:
            raise damage(path, key.decode() or "the database", error) from error
        if found is not None:
            yield from found[0]
            start, tries = start + together, 0
            continue
        together, tries = max(1, together // 2), tries + 1
        if tries == _TRIES:
            raise busy(path, keys[start].decode())


def busy(path: str, what: str) -> DataError:
    """A writer was faster, always."""
    return DataError(
        f"{path}: another process writes this database so fast that {what} could not be read; let the writer"
        " finish, or read a copy of the database"
    )


def damage(path: str, what: str, error: lmdb.Error) -> DataError:
    """What LMDB said when a record was read."""
    if isinstance(error, lmdb.MapResizedError):
        return DataError(
            f"{path}: it has grown by more than there was room for since it was opened; give the same"
            " command again"
        )
    return DataError(f"{path}: {what} cannot be read ({error}); copy or write the database again")


def _try(environment: lmdb.Environment, read: Callable[[lmdb.Transaction], T]) -> tuple[T] | None:
    """What `read` returns or raises; None if the state that it read may have been written over."""
    with environment.begin() as transaction:
        try:
            found = read(transaction)
        except (lmdb.Error, DataError):
            if _outdated(environment, transaction):
                return None
            raise
        return None if _outdated(environment, transaction) else (found,)


def _outdated(environment: lmdb.Environment, transaction: lmdb.Transaction) -> bool:
    return bool(environment.info()["last_txnid"] - transaction.id() > 1)
