"""What the report knows of a run: its config, its metrics as columns, and the figures of the page's head."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmim_fast.config import RunConfig
from lmim_fast.config.io import read_run_config
from lmim_fast.errors import LmimError, UsageError
from lmim_fast.train.optim import total_steps
from lmim_fast.train.task import Task
from lmim_fast.train.tasks import make_task

_LARGEST = 3.5e38  # about the largest fp32 number; the sums and squares of a chart stay finite in fp64


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl as columns over the step: one row a step, in order, whatever the run went through."""

    steps: np.ndarray
    """(n,) int64, strictly increasing."""
    columns: dict[str, np.ndarray]
    """Name -> (n,) float64; NaN where a line had no number."""
    malformed: int
    """Lines that were no JSON object with a step."""
    replayed: int
    """Lines that a resumed run wrote anew: the newer ones count."""

    def column(self, name: str) -> np.ndarray:
        """(n,) float64, all NaN when no line had `name`."""
        return self.columns.get(name, np.full(len(self.steps), math.nan))

    def finite(self, name: str) -> np.ndarray:
        """The numbers of a column without its gaps, in order of step."""
        values = self.column(name)
        return values[np.isfinite(values)]


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    folder: Path
    config: RunConfig
    document: dict[str, Any]
    """config.json as written: config, versions, data."""
    metrics: Metrics

    @property
    def name(self) -> str:
        """The run folder's own name."""
        return self.folder.resolve().name

    @property
    def task(self) -> Task:
        """What the run trained."""
        return make_task(self.config)

    @property
    def done(self) -> int:
        """The last step that the run logged or kept a checkpoint of."""
        kept = [
            int(path.name[5:]) for path in self.folder.glob("checkpoints/step-*") if path.name[5:].isdigit()
        ]
        return max([int(self.metrics.steps[-1]), *kept])

    @property
    def total(self) -> int | None:
        """Steps the run was to make; None when they hang on a data size that config.json does not give."""
        if self.config.steps is not None:
            return self.config.steps
        count = _sample_count(self.document.get("data"))
        return None if count is None else total_steps(self.config, count)


def read_run(folder: Path) -> Run:
    """Read config.json and metrics.jsonl of a run folder.

    Raises:
        UsageError: no such folder, or it is not a run folder.
        LmimError: a file that cannot be read or used, with its path.
    """
    if not folder.is_dir():
        raise UsageError(f"no run folder at {folder}")
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} has no {name}: not a run folder of `lmim pretrain` or `lmim finetune`, "
                "or one that never started"
            )
    config, document = read_config(folder)
    return Run(folder, config, document, read_metrics(folder / "metrics.jsonl"))


def read_config(place: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The config of a run, from its folder or its config.json, and the whole document.

    Raises:
        UsageError: there is no such file.
        LmimError:  it cannot be read or used.
    """
    path = place / "config.json" if place.is_dir() else place
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give the folder of a run, or its config.json")
    try:
        return read_run_config(path)
    except OSError as error:
        raise LmimError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise LmimError(str(error)) from error


def read_metrics(path: Path) -> Metrics:
    """Read a metrics.jsonl, leaving out malformed lines and those that a resume wrote anew.

    Raises:
        LmimError: the file cannot be read, or no line of it can.
    """
    rows: list[dict[str, Any]] = []
    malformed = replayed = 0
    for line in read_text(path).split("\n"):
        row = json_row(line)
        if row is None:
            malformed += bool(line.strip())
            continue
        while rows and rows[-1]["step"] >= row["step"]:  # the run went on from an older checkpoint
            rows.pop()
            replayed += 1
        rows.append(row)
    if not rows:
        content = f"{malformed} malformed lines and nothing else" if malformed else "no line"
        raise LmimError(f"{path} holds {content}: the run has logged no step yet")
    names = sorted({name for row in rows for name in row} - {"step"})
    columns = {name: np.array([number(row.get(name)) for row in rows]) for name in names}
    return Metrics(np.array([row["step"] for row in rows], dtype=np.int64), columns, malformed, replayed)


def json_row(line: str) -> dict[str, Any] | None:
    """The line's object when it has a whole, non-negative step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or isinstance(row["step"], bool):
        return None
    return row if 0 <= row["step"] < 2**53 else None


def number(value: Any) -> float:
    """A value of a line as a float: NaN where it is no number, infinite where fp32 has none so large."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    if abs(value) > _LARGEST:
        return math.nan if isinstance(value, int) else math.copysign(math.inf, value)
    return float(value)


def read_text(path: Path) -> str:
    """The text of a file of a run, also with a byte order mark or bytes that are not UTF-8.

    Raises:
        LmimError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise LmimError(f"cannot read {path}: {error.strerror}") from error


def _sample_count(fingerprint: Any) -> int | None:
    """Samples of the run's data, from its `RecordStore.fingerprint()`."""
    count = fingerprint.get("count") if isinstance(fingerprint, dict) else None
    return count if isinstance(count, int) and count > 0 else None
