"""Checkpoint folders that go: what an interrupted save has left, old ones, damaged ones."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from lmim_fast import durable
from lmim_fast.train.checkpoint import folders
from lmim_fast.train.checkpoint.files import explain


def remove_unfinished(run: Path) -> None:
    """Delete what an interrupted save left behind."""
    for path in folders.entries(run):
        if path.name.startswith("step-") and path.suffix == ".tmp":
            delete(path)


def delete(folder: Path) -> None:
    """Delete a folder that nobody needs; where that fails the run is still healthy."""
    doomed = folder if folder.suffix == ".tmp" else folders.unfinished(folder)
    try:
        if doomed != folder:
            folders.discard(folder)
            folder.rename(doomed)  # half deleted it must not look finished
        durable.remove(doomed)
    except OSError as error:
        # The same text for every folder, so that Python shows it once.
        reason = error.strerror or error
        warnings.warn(
            f"old folders in {folder.parent} cannot be deleted ({reason}); delete them by hand",
            stacklevel=1,
        )


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that neither resume nor retention counts it; what it is called now.

    One of the same step that was set aside before stays: people may want to look into it.

    Raises:
        LmimError: it cannot be renamed.
    """
    aside, number = path.with_name(path.name + ".damaged"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged.{number}")
    try:
        return path.rename(aside)
    except OSError as error:
        raise explain(error, aside) from error
