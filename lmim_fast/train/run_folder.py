"""A run folder: it is made, becomes one run's alone, and says what the run is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmim_fast.errors import UsageError
from lmim_fast.owner import Owner
from lmim_fast.train.checkpoint import removal
from lmim_fast.train.checkpoint.files import explain, write_file
from lmim_fast.train.world import World

Say = Callable[[str], None]


def take(run: Path, world: World, say: Say, outside: contextlib.ExitStack) -> Owner | None:
    """Make the run folder this run's alone, before anything in it counts; the owner is a process: rank 0's.

    An owner on another machine may have to be watched for longer than ranks wait for each other, so they talk
    meanwhile.

    Raises:
        UsageError: another run has it, or it cannot be made or written.
    """
    owner = Owner(run) if world.is_main else None
    if owner is not None:
        outside.callback(owner.release)
    waiting = 1
    while waiting:
        with world.together():
            ours = owner is None or _try_to_own(owner, run, say)
        (waiting,) = world.largest(not ours)
    return owner


def _try_to_own(owner: Owner, run: Path, say: Say) -> bool:
    _check_folder(run)
    try:
        return owner.acquire(say)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise explain(error, run) from error
        what = "written" if run.is_dir() else "made"
        raise UsageError(f"--output {run}: cannot be {what} ({error.strerror})") from error


def _check_folder(run: Path) -> None:
    """Refuse a run folder in which this run could not write, as far as that is seen."""
    for folder in (run, run / "checkpoints", run / "tensorboard"):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--output {run}: {folder} is in the way, it should be a folder")
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"--output {run}: no permission to write in {folder}")


def describe(run: Path, identity: dict[str, Any]) -> None:
    """Clear what an interrupted save left, and write down what the run is."""
    removal.remove_unfinished(run)
    description = {name: identity[name] for name in ("config", "versions", "data")}
    write_file(run / "config.json", json.dumps(description, indent=1).encode())
