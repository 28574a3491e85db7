"""Tensors of a checkpoint: out of model and optimiser, and back in. The teacher lies apart, once a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lmim_fast.errors import CheckpointError
from lmim_fast.models.weights import TEACHER
from lmim_fast.train.checkpoint import folders
from lmim_fast.train.checkpoint.files import read_checked, write_file
from lmim_fast.train.checkpoint.folders import MODEL_FILE, OPTIMIZER_FILE, Checkpoint

_TEACHER_FILE = "teacher.safetensors"


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _own(model: nn.Module, *, teacher: bool) -> dict[str, Tensor]:
    """The tensors of the frozen teacher, or those of everything else."""
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    state = model.state_dict()  # a tensor under a second name is left out: it is stored once
    return {name: t for name, t in state.items() if name in names and name.startswith(TEACHER) == teacher}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors, named `KIND.PARAMETER`, for example `exp_avg.norm.weight`."""
    return {
        f"{kind}.{name}": _host(value)
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _load(path: Path, tensors: dict[str, Tensor], model: nn.Module, *, teacher: bool) -> None:
    expected = _own(model, teacher=teacher)
    wrong = sorted(set(tensors) ^ set(expected))
    wrong += [n for n in sorted(set(tensors) & set(expected)) if tensors[n].shape != expected[n].shape]
    if wrong:
        names = ", ".join(wrong[:8])
        raise CheckpointError(f"{path} does not fit the model in {len(wrong)} tensors: {names}")
    model.load_state_dict(tensors, strict=False)  # the other half is loaded apart


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
            raise CheckpointError(f"{checkpoint.path / OPTIMIZER_FILE}: the model has no {name}")
        optimizer.state[parameters[name]][kind] = value.to(parameters[name].device, copy=True)


def save(
    run: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int
) -> Path:
    """Write the checkpoint of `state["step"]`, as `folders.write` does."""
    student = {name: _host(tensor) for name, tensor in _own(model, teacher=False).items()}
    return folders.write(run, state, student, _optimizer_tensors(model, optimizer), keep=keep)


def save_teacher(run: Path, model: nn.Module) -> dict[str, Any] | None:
    """Store the frozen teacher once for the run; its size and checksum, None where the model has none."""
    teacher = _own(model, teacher=True)
    tensors = {name.removeprefix(TEACHER): _host(tensor) for name, tensor in teacher.items()}
    return write_file(run / _TEACHER_FILE, safetensors.torch.save(tensors)) if tensors else None


def load_teacher(run: Path, line: dict[str, Any] | None, model: nn.Module) -> None:
    """Put the run's stored teacher into `model`; `line` is the size and checksum it must have.

    Raises:
        CheckpointError: it is missing, altered, or of another size.
    """
    if line is None:
        return
    tensors = safetensors.torch.load(read_checked(run / _TEACHER_FILE, line))
    named = {TEACHER + name: tensor for name, tensor in tensors.items()}
    _load(run / _TEACHER_FILE, named, model, teacher=True)
