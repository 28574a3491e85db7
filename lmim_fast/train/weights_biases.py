"""Weights & Biases, for those who have it: one run there for a run folder, and none ends because of it."""

from __future__ import annotations

import importlib
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmim_fast.errors import UsageError, shared
from lmim_fast.train.checkpoint.files import write_file

ID_FILE = "wandb_id"


def require_wandb(project: str | None) -> None:
    """Refuse `--wandb` where its package is missing, before anything is opened; every rank may call it.

    Raises:
        UsageError: it is missing.
    """
    if project is not None:
        _package(project)


def _package(project: str) -> Any:
    try:
        package = importlib.import_module("wandb")
    except ImportError:
        package = None
    if not hasattr(package, "init"):  # so is a mere folder of that name, such as W&B makes
        raise shared(UsageError(f"--wandb {project} needs the package wandb: pip install wandb"))
    return package


class WandbRun:
    """A run of a project; the first thing that fails is said, and from then on nothing is logged.

    Args:
        project: its name.
        run:     folder of the run; its file `wandb_id` keeps the id, so that a resume continues the same one.
        config:  of the run.
        say:     is told what failed.
    Raises:
        UsageError: the package is not installed.
        LmimError:  the id cannot be written.
    """

    def __init__(self, project: str, run: Path, config: dict[str, Any], say: Callable[[str], None]) -> None:
        package = _package(project)
        self._say = say
        self._run: Any = None
        self._run = self._try(
            lambda: package.init(
                project=project,
                id=_id_of(run),
                resume="allow",
                name=run.resolve().name,
                dir=str(run),
                config=config,
            )
        )

    def log(self, line: Mapping[str, Any], step: int) -> None:
        """Log the numbers of a step that are not None."""
        if self._run is not None:
            numbers = {name: value for name, value in line.items() if name != "step" and value is not None}
            self._try(lambda: self._run.log(numbers, step=step))

    def finish(self, *, failed: bool) -> None:
        """Send what is left."""
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # a service elsewhere, in whatever way it fails
            self._run = None
            self._say(f"warning: no more is logged to Weights & Biases ({type(error).__name__}: {error})")
            return None


def _id_of(run: Path) -> str:
    """The id in the run's folder; a new one if there is none, or none that W&B takes."""
    path = run / ID_FILE
    if path.is_file():
        known = path.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[a-z0-9]{8,64}", known):
            return known
    new = secrets.token_hex(8)
    write_file(path, new.encode())
    return new
