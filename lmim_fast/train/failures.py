"""Which rank tells the user of a failure. Imports nothing heavy: the command line reads it at its start."""

from __future__ import annotations

from typing import TypeVar

Failure = TypeVar("Failure", bound=Exception)

_SHARED = "_lmim_shared"  # any exception can carry it, also those of other packages


def shared(failure: Failure) -> Failure:
    """The same failure, marked as one that another rank tells too: `raise shared(error)`."""
    setattr(failure, _SHARED, True)
    return failure


def is_shared(failure: Exception) -> bool:
    """Whether rank 0 (or the first process of this machine) tells the user of it, so that others need not."""
    return getattr(failure, _SHARED, False)
