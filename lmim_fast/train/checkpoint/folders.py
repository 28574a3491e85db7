"""Checkpoint folders: whole or absent, each with a manifest that every read is checked against.

RUN/
  teacher.safetensors         the frozen teacher, once; its checksum is in every state.json
  checkpoints/
    step-00000300/
      model.safetensors       student and position tables
      optimizer.safetensors   moments and step of every trainable parameter
      state.json              step, meter, config, data, versions; size and checksum of each file
    step-00000300.tmp/        being written: flushed to disk, then renamed
    step-00000200.damaged/    set aside: neither resume nor retention counts it
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lmim_fast.errors import CheckpointError
from lmim_fast.train.checkpoint.files import explain, flush_folder, read_checked, write_flushed

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
_FOLDER = re.compile(r"step-\d{8}")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read into host memory."""

    path: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def write(
    run: Path, state: dict[str, Any], model: dict[str, Tensor], optimizer: dict[str, Tensor], *, keep: int
) -> Path:
    """Write the checkpoint of `state["step"]`, then delete all but the `keep` newest (or warn).

    Raises:
        LmimError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    final = run / "checkpoints" / f"step-{state['step']:08d}"
    temporary = final.with_name(final.name + ".tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)  # there, if it could not be removed
        files = {
            MODEL_FILE: write_flushed(temporary / MODEL_FILE, safetensors.torch.save(model)),
            OPTIMIZER_FILE: write_flushed(temporary / OPTIMIZER_FILE, safetensors.torch.save(optimizer)),
        }
        body = {**state, "files": files}
        text = json.dumps({**body, "checksum": _checksum(body)}, indent=1)
        write_flushed(temporary / STATE_FILE, text.encode())
        flush_folder(temporary)
        temporary.rename(final)
        flush_folder(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise explain(error, final) from error
    for old in finished(run)[keep:]:
        _remove(old)
    return final


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def finished(run: Path) -> list[Path]:
    """A run's finished checkpoint folders, newest first."""
    finished = [path for path in run.glob("checkpoints/step-*") if _FOLDER.fullmatch(path.name)]
    return sorted(finished, key=lambda path: path.name, reverse=True)


def steps(run: Path) -> list[int]:
    """Steps of a run's finished checkpoints, good or damaged, newest first."""
    return [int(path.name.removeprefix("step-")) for path in finished(run)]


def _read_state(path: Path) -> dict[str, Any]:
    try:
        body: dict[str, Any] = json.loads(path.read_text())
        checksum = body.pop("checksum")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint's state: {error}") from error
    if checksum != _checksum(body):
        raise CheckpointError(f"{path} was altered: its checksum does not fit its content")
    return body


def read(path: Path) -> Checkpoint:
    """A checkpoint folder, every byte of it checked against its manifest.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the message names it.
    """
    state = _read_state(path / STATE_FILE)
    model, optimizer = (
        safetensors.torch.load(read_checked(path / name, state["files"][name]))
        for name in (MODEL_FILE, OPTIMIZER_FILE)
    )
    return Checkpoint(path, state, model, optimizer)


def newest(run: Path, damaged: Callable[[Path, CheckpointError], None] | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a run; `damaged` is called with every newer one that is not whole."""
    for path in finished(run):
        try:
            return read(path)
        except CheckpointError as error:
            if damaged is not None:
                damaged(path, error)
    return None


def latest(run_folder: str | Path) -> Path | None:
    """Folder of a run's newest whole checkpoint, or None."""
    checkpoint = newest(Path(run_folder))
    return None if checkpoint is None else checkpoint.path


def remove_unfinished(run: Path) -> None:
    """Delete what an interrupted save left behind."""
    for path in run.glob("checkpoints/step-*.tmp"):
        _remove(path)


def _remove(folder: Path) -> None:
    """Delete a folder that nobody needs; where that fails the run is still healthy."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        # The same text for every folder, so that Python shows it once.
        reason = error.strerror or error
        warnings.warn(
            f"old folders in {folder.parent} cannot be deleted ({reason}); delete them by hand",
            stacklevel=1,
        )


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that neither resume nor retention counts it."""
    aside = path.with_name(path.name + ".damaged")
    if aside.exists():
        shutil.rmtree(aside)
    return path.rename(aside)
