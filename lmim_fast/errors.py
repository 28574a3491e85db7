"""Errors that are the user's to mend: the command line prints them as one line."""

from __future__ import annotations

import os
from typing import TypeVar


class LmimError(Exception):
    """A failure with a message for the user; the command line exits with 1."""


class UsageError(LmimError):
    """A wrong option or path; the command line exits with 2."""


class DataError(LmimError):
    """A record or a database that cannot be used."""


class WeightsError(LmimError):
    """A checkpoint that does not fit the model, with the names and shapes in the message."""


class CheckpointError(LmimError):
    """A checkpoint file that is missing, unfinished or altered."""


Failure = TypeVar("Failure", bound=Exception)

_SHARED = "_lmim_shared"  # any exception can carry it, also those of other packages


def shared(failure: Failure) -> Failure:
    """The same failure, marked as one that another rank reports too: `raise shared(error)`."""
    setattr(failure, _SHARED, True)
    return failure


def shared_on_this_machine(failure: Failure) -> Failure:
    """The same failure, marked unless this is the first process of its machine, which reports it."""
    return failure if os.environ.get("LOCAL_RANK", "0") in ("", "0") else shared(failure)


def is_shared(failure: Exception) -> bool:
    """Whether rank 0 (or the first process of this machine) reports it, so that others need not."""
    return getattr(failure, _SHARED, False)
