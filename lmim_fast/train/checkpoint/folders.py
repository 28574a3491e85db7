"""Checkpoint folders: whole or absent, each with a manifest that every read is checked against.

RUN/
  teacher.safetensors         the frozen teacher, once; its checksum is in every state.json
  checkpoints/
    step-00000300/
      model.safetensors       student and position tables
      optimizer.safetensors   moments and step of every trainable parameter
      shards/                 of a sharded checkpoint, instead of these two: a file a process, and an index
      state.json              step, meter, config, data, versions; size and checksum of each file
    step-00000300.tmp/        being written: flushed to disk, then renamed; or being deleted
    step-00000200.damaged/    set aside: neither resume nor retention counts it

A folder counts by its name, which must be that of the step inside: reading a renamed one is an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import safetensors.torch
from torch import Tensor

from lmim_fast import durable, faults
from lmim_fast.errors import CheckpointError, LmimError
from lmim_fast.train.checkpoint import shards
from lmim_fast.train.checkpoint.files import (
    check_file,
    explained,
    read_checked,
    reading,
    write_flushed,
    write_tensors,
)
from lmim_fast.train.checkpoint.state import Fields, check_fields, checksum_of, read_state

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
SHARDS = "shards"
MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."  # of names where both kinds of tensors are together
_FOLDER = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its tensors are in host memory, or still in the files of a sharded one."""

    path: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @property
    def shards(self) -> Path | None:
        """Folder of the tensors, if they are not in memory."""
        return self.path / SHARDS if is_sharded(self.state) and not self.model else None


class MisnamedError(LmimError):
    """A checkpoint folder with the name of another step: it is whole, so it is not set aside."""


def is_sharded(state: dict[str, Any]) -> bool:
    """Whether state.json is of a checkpoint that several processes wrote."""
    return state.get("layout") == "sharded"


def folder_of(run: Path, step: int) -> Path:
    """Where the finished checkpoint of a step is."""
    return run / "checkpoints" / f"step-{step:08d}"


def unfinished(final: Path) -> Path:
    """Where a checkpoint is written before it gets the name `final`."""
    return durable.temporary_name(final)


def begin(final: Path) -> Path:
    """Make the folder that a checkpoint is written in, new and no link; this folder."""
    discard(final)
    temporary = unfinished(final)
    if os.path.lexists(temporary):  # NFS keeps the files that another process has open
        temporary.rename(temporary.with_name(f"{final.name}.{os.getpid()}.tmp"))
    temporary.mkdir(parents=True)
    return temporary


def discard(final: Path) -> None:
    """Delete what a failed or killed save of the checkpoint `final` has left."""
    with contextlib.suppress(OSError):
        durable.remove(unfinished(final))


@contextlib.contextmanager
def writing(final: Path) -> Iterator[Path]:
    """A block that fills the folder it is given, and ends with `commit`; if it fails nothing is left of it.

    Raises:
        LmimError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    try:
        yield begin(final)
    except Exception as failure:
        discard(final)
        told = explained(failure, final)
        if told is failure:
            raise
        raise told from failure


def write_whole(
    temporary: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Write the files of a checkpoint that is not sharded; their lines of the manifest."""
    files = {}
    for name, tensors in ((MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)):
        files[name] = write_tensors(temporary / name, tensors)
        faults.point("save")
    return files


def commit(final: Path, state: dict[str, Any], files: dict[str, dict[str, Any]]) -> Path:
    """Write state.json beside the written `files` and give the folder its name; this folder."""
    temporary = unfinished(final)
    body = {**state, "files": files}
    text = json.dumps({**body, "checksum": checksum_of(body)}, indent=1)
    write_flushed(temporary / STATE_FILE, text.encode())
    faults.point("save")
    durable.flush_folder(temporary)
    faults.point("commit")
    temporary.rename(final)
    durable.flush_folder(final.parent)
    return final


def is_finished_name(name: str) -> bool:
    """Whether a finished checkpoint folder can be called so."""
    return _FOLDER.fullmatch(name) is not None


def finished(run: Path) -> list[Path]:
    """A run's finished checkpoint folders, by their names, newest first.

    Raises:
        LmimError: their folder cannot be read, which does not mean that there are none.
    """
    finished = [path for path in entries(run) if is_finished_name(path.name)]
    return sorted(finished, key=step_of, reverse=True)


def misnamed(run: Path) -> list[str]:
    """Names beside them under which checkpoints are not found, such as `step-300` or `step-00000300 (copy)`.

    Raises:
        LmimError: as of `finished`.
    """
    paths = [path for path in entries(run) if not is_finished_name(path.name)]
    kept = [path for path in paths if path.suffix != ".tmp" and ".damaged" not in path.suffixes]
    return sorted(path.name for path in kept if os.path.isfile(path / STATE_FILE))


def entries(run: Path) -> list[Path]:
    """All that lies beside the finished checkpoints of a run, and they.

    Raises:
        LmimError: as of `finished`.
    """
    folder = run / "checkpoints"
    try:
        with reading(folder):
            return [folder / name for name in os.listdir(folder)]
    except CheckpointError:
        return []  # there is no such folder


def step_of(path: Path) -> int:
    """Step of a finished checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def steps(run: Path) -> list[int]:
    """Steps of a run's finished checkpoints, good or damaged, newest first."""
    return [step_of(path) for path in finished(run)]


def state_of(path: Path) -> dict[str, Any]:
    """The state in a finished checkpoint folder.

    Raises:
        CheckpointError: it is missing or altered.
        MisnamedError: the folder has the name of another step.
        LmimError: it cannot be read.
    """
    state = read_state(path / STATE_FILE)
    step = state.get("step")
    if is_finished_name(path.name) and step != step_of(path):
        right = f"step-{step:08d}" if isinstance(step, int) else "what it was"
        raise MisnamedError(
            f"{path} holds the checkpoint of step {step}, not of the step in its name: rename it to {right}, "
            f"or move it out of {path.parent}"
        )
    return state


def verify(path: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint folder against its manifest; its state.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the message names it.
        LmimError: a file cannot be read, or the folder has the name of another step.
    """
    state = state_of(path)
    for name, line in state["files"].items():
        check_file(path / name, line)
    return state


def read(path: Path) -> Checkpoint:
    """A checkpoint folder, every byte of it checked against its manifest, all tensors in host memory.

    Raises:
        CheckpointError: a file is missing, truncated or altered; the message names it.
        LmimError: a file cannot be read, or the folder has the name of another step.
    """
    state = state_of(path)
    with reading(path):
        if is_sharded(state):
            verify(path)
            return Checkpoint(path, state, *split(shards.read(path / SHARDS)))
        model, optimizer = (
            safetensors.torch.load(read_checked(path / name, state["files"][name]))
            for name in (MODEL_FILE, OPTIMIZER_FILE)
        )
    return Checkpoint(path, state, model, optimizer)


def split(values: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """What belongs to the tensors of the model, and of the optimiser, under names without prefix."""
    model, optimizer = (
        {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        for prefix in (MODEL_PREFIX, OPTIMIZER_PREFIX)
    )
    return model, optimizer


def open_verified(path: Path) -> Checkpoint:
    """As `read`, but the tensors of a sharded checkpoint stay in its files until a model takes its share.

    Raises:
        CheckpointError, LmimError: as of `read`.
    """
    if is_sharded(state_of(path)):
        return Checkpoint(path, verify(path), {}, {})
    return read(path)


def open_trusted(path: Path) -> Checkpoint:
    """As `open_verified`, of a checkpoint whose shards another process has just verified."""
    state = state_of(path)
    return Checkpoint(path, state, {}, {}) if is_sharded(state) else read(path)


def newest(
    run: Path,
    damaged: Callable[[Path, CheckpointError], None] | None = None,
    *,
    in_memory: bool = True,
    fields: Fields = MappingProxyType({}),
) -> Checkpoint | None:
    """The newest whole checkpoint of a run; `damaged` is called with every newer one that is not whole.

    Args:
        in_memory: False leaves the tensors of a sharded one in its files.
        fields:    what must be true of its state; one that lacks it is not whole.
    Raises:
        LmimError: a file cannot be read, or a folder has the name of another step.
    """
    for path in finished(run):
        try:
            checkpoint = read(path) if in_memory else open_verified(path)
            check_fields(path / STATE_FILE, checkpoint.state, fields)
            return checkpoint
        except CheckpointError as error:
            if damaged is not None:
                damaged(path, error)
    return None


def latest(run_folder: str | Path) -> Path | None:
    """Folder of a run's newest whole checkpoint, or None.

    Raises:
        LmimError: as of `newest`.
    """
    for path in finished(Path(run_folder)):
        with contextlib.suppress(CheckpointError):
            verify(path)
            return path
    return None


def weights_file(path: Path) -> Path:
    """The safetensors file with the weights of a checkpoint folder.

    Raises:
        CheckpointError: it is sharded, so there is none; the message says how to make one.
    """
    if is_sharded(read_state(path / STATE_FILE)):
        raise CheckpointError(
            f"{path} is sharded: write its weights to a file with `lmim convert`, and name that file"
        )
    return path / MODEL_FILE
