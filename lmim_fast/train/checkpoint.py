"""Checkpoints: folders that are whole or absent, each with a manifest that every read is checked against.

`RUN/checkpoints/step-00000300/` holds model.safetensors (student and position tables), optimizer.safetensors
and state.json. The frozen teacher is in none of them: it lies once in `RUN/teacher.safetensors`, and every
state.json names its checksum. A folder is written as `step-N.tmp`, flushed to disk, then renamed.
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
import torch
from torch import Tensor, nn

from lmim_fast.config import PretrainConfig
from lmim_fast.config.io import from_dict
from lmim_fast.train.build import build_model
from lmim_fast.train.files import (
    CheckpointError,
    explain,
    flush_folder,
    read_checked,
    write_file,
    write_flushed,
)

_TEACHER_PREFIX = "model_maeenc_momentum."
MODEL_FILE, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_TEACHER = "teacher.safetensors"
_FOLDER = re.compile(r"step-\d{8}")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read into host memory."""

    path: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


# --- tensors in and out of a model ---


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _own(model: nn.Module, *, teacher: bool) -> dict[str, Tensor]:
    """The tensors of the frozen teacher, or those of everything else."""
    state = model.state_dict()
    return {name: t for name, t in state.items() if name.startswith(_TEACHER_PREFIX) == teacher}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors, named `KIND.PARAMETER`, for example `exp_avg.norm.weight`."""
    return {
        f"{kind}.{name}": _host(value)
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _load(path: Path, found: dict[str, Tensor], model: nn.Module, *, teacher: bool) -> None:
    wanted = _own(model, teacher=teacher)
    wrong = sorted(set(found) ^ set(wanted))
    wrong += [n for n in sorted(set(found) & set(wanted)) if found[n].shape != wanted[n].shape]
    if wrong:
        names = ", ".join(wrong[:8])
        raise CheckpointError(f"{path} does not fit the model in {len(wrong)} tensors: {names}")
    model.load_state_dict(found, strict=False)  # the other half is loaded apart


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put a checkpoint's tensors into the model (its teacher is left alone) and the optimiser.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    _load(checkpoint.path / MODEL_FILE, checkpoint.model, model, teacher=False)
    if optimizer is None:
        return
    parameters = dict(model.named_parameters())
    for key, value in checkpoint.optimizer.items():
        kind, _, name = key.partition(".")
        if name not in parameters:
            raise CheckpointError(f"{checkpoint.path / _OPTIMIZER}: the model has no {name}")
        optimizer.state[parameters[name]][kind] = value.to(parameters[name].device, copy=True)


# --- writing ---


def save(
    run: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int
) -> Path:
    """Write the checkpoint of `state["step"]`, then delete all but the `keep` newest (or warn).

    Raises:
        LmimError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    final = run / "checkpoints" / f"step-{state['step']:08d}"
    temporary = final.with_name(final.name + ".tmp")
    student = {name: _host(tensor) for name, tensor in _own(model, teacher=False).items()}
    moments = _optimizer_tensors(model, optimizer)
    try:
        temporary.mkdir(parents=True, exist_ok=True)  # there, if it could not be removed
        files = {
            MODEL_FILE: write_flushed(temporary / MODEL_FILE, safetensors.torch.save(student)),
            _OPTIMIZER: write_flushed(temporary / _OPTIMIZER, safetensors.torch.save(moments)),
        }
        body = {**state, "files": files}
        text = json.dumps({**body, "checksum": _checksum(body)}, indent=1)
        write_flushed(temporary / _STATE, text.encode())
        flush_folder(temporary)
        temporary.rename(final)
        flush_folder(final.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise explain(error, final) from error
    for old in _folders(run)[keep:]:
        _remove(old)
    return final


def save_teacher(run: Path, model: nn.Module) -> dict[str, Any] | None:
    """Store the frozen teacher once for the run; its size and checksum, None where the model has none."""
    teacher = _own(model, teacher=True)
    tensors = {name.removeprefix(_TEACHER_PREFIX): _host(tensor) for name, tensor in teacher.items()}
    return write_file(run / _TEACHER, safetensors.torch.save(tensors)) if tensors else None


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


# --- reading ---


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _folders(run: Path) -> list[Path]:
    """Finished checkpoint folders, newest first."""
    found = [path for path in run.glob("checkpoints/step-*") if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def steps(run: Path) -> list[int]:
    """Steps of a run's finished checkpoints, good or damaged, newest first."""
    return [int(path.name.removeprefix("step-")) for path in _folders(run)]


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
    state = _read_state(path / _STATE)
    model, optimizer = (
        safetensors.torch.load(read_checked(path / name, state["files"][name]))
        for name in (MODEL_FILE, _OPTIMIZER)
    )
    return Checkpoint(path, state, model, optimizer)


def newest(run: Path, damaged: Callable[[Path, CheckpointError], None] | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a run; `damaged` hears of every newer one that is not whole."""
    for path in _folders(run):
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


def load_teacher(run: Path, line: dict[str, Any] | None, model: nn.Module) -> None:
    """Put the run's stored teacher into `model`; `line` is the size and checksum it must have.

    Raises:
        CheckpointError: it is missing, altered, or of another size.
    """
    if line is None:
        return
    tensors = safetensors.torch.load(read_checked(run / _TEACHER, line))
    named = {_TEACHER_PREFIX + name: tensor for name, tensor in tensors.items()}
    _load(run / _TEACHER, named, model, teacher=True)


def load_model(run_folder: str | Path, step: int | None = None) -> tuple[nn.Module, PretrainConfig]:
    """A run's model, teacher included, in eval mode on the CPU, and the run's config.

    Args:
        run_folder: run folder of a pre-training run.
        step: the checkpoint to take; None takes the newest whole one.
    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    run = Path(run_folder)
    problems: list[str] = []
    if step is None:
        checkpoint = newest(run, lambda _, error: problems.append(str(error)))
    else:
        checkpoint = read(run / "checkpoints" / f"step-{step:08d}")
    if checkpoint is None:
        raise CheckpointError("; ".join([f"{run} has no usable checkpoint", *problems]))
    config = from_dict(PretrainConfig, checkpoint.state["config"])
    model = build_model(config)
    restore(checkpoint, model)
    load_teacher(run, checkpoint.state["teacher"], model)
    return model.eval(), config
