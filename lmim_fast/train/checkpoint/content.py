"""Tensors of a checkpoint: out of model and optimiser, and back in. The teacher lies apart, once a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lmim_fast.errors import CheckpointError, LmimError
from lmim_fast.models.weight_names import TEACHER
from lmim_fast.train.checkpoint import folders, shards
from lmim_fast.train.checkpoint.files import check_file, read_checked, write_file
from lmim_fast.train.checkpoint.folders import MODEL_FILE, OPTIMIZER_FILE, Checkpoint

_TEACHER_FILE = "teacher.safetensors"


def _own(model: nn.Module, *, teacher: bool) -> dict[str, Tensor]:
    """The tensors of the frozen teacher, or those of everything else."""
    # First: a sharded model then frees what a forward has gathered, and names its sharded parameters again.
    state = model.state_dict()
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    # A tensor under a second name is left out: it is stored once.
    return {name: t for name, t in state.items() if name in names and name.startswith(TEACHER) == teacher}


def live_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that a checkpoint is made of, as they are: the model's but its teacher, the optimiser's.

    Those of the optimiser are named `KIND.PARAMETER`, for example `exp_avg.norm.weight`. Every rank gets the
    same names in the same order.

    Raises:
        CheckpointError: the optimiser has moments of a tensor that the model does not name.
    """
    own = _own(model, teacher=False)
    moments = {
        f"{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }
    unknown = set(optimizer.state) - set(model.parameters())
    if unknown:
        raise CheckpointError(
            f"the optimiser trains {len(unknown)} tensors that are not the model's parameters: their moments "
            "would be lost; make the optimiser after the model has its final form"
        )
    return dict(sorted(own.items())), dict(sorted(moments.items()))


def _host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _share(value: Tensor, target: DTensor) -> Tensor:
    """This rank's part of a whole tensor; each rank cuts out its own, without a message."""
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).to_local()


def _check(path: Path, found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    wrong = sorted(set(found) ^ set(expected))
    wrong += [name for name in sorted(set(found) & set(expected)) if found[name] != expected[name]]
    if wrong:
        names = ", ".join(wrong[:8])
        raise CheckpointError(f"{path} does not fit the model in {len(wrong)} tensors: {names}")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@torch.no_grad()
def _load(path: Path, tensors: dict[str, Tensor], model: nn.Module, *, teacher: bool) -> None:
    expected = _own(model, teacher=teacher)
    _check(path, _shapes(tensors), _shapes(expected))
    sharded = {name: target for name, target in expected.items() if isinstance(target, DTensor)}
    for name, target in sharded.items():
        target.to_local().copy_(_share(tensors[name], target))
    # The other half, teacher or student, is loaded apart.
    model.load_state_dict({n: t for n, t in tensors.items() if n not in sharded}, strict=False)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put a checkpoint's tensors into the model (its teacher is left alone) and the optimiser.

    Any checkpoint fits any sharding of its model: each rank takes its own part, and none waits for another.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    if checkpoint.shards is not None:
        _restore_shards(checkpoint.shards, model, optimizer)
        return
    _load(checkpoint.path / MODEL_FILE, checkpoint.model, model, teacher=False)
    if optimizer is None:
        return
    place = checkpoint.path / OPTIMIZER_FILE
    owners = _owners(place, _shapes(checkpoint.optimizer), model)
    for key, (kind, parameter) in owners.items():
        optimizer.state[parameter][kind] = _moment(checkpoint.optimizer[key], parameter)


def _owners(
    place: Path, found: Mapping[str, torch.Size], model: nn.Module
) -> dict[str, tuple[str, nn.Parameter]]:
    """Kind and parameter of each of the optimiser's tensors, by key."""
    parameters, owners = dict(model.named_parameters()), {}
    for key, shape in found.items():
        kind, _, name = key.partition(".")
        if name not in parameters:
            raise CheckpointError(f"{place}: the model has no {name}")
        if shape not in (parameters[name].shape, torch.Size()):
            raise CheckpointError(f"{place}: {key} has the shape {tuple(shape)}, not that of {name}")
        owners[key] = kind, parameters[name]
    return owners


def _empty_moment(shape: torch.Size, dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """Room for a tensor of the optimiser: sharded as its parameter, unless it is a count of steps."""
    if shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device)


def _moment(value: Tensor, parameter: Tensor) -> Tensor:
    moment = _empty_moment(value.shape, value.dtype, parameter)
    if isinstance(moment, DTensor):
        moment.to_local().copy_(_share(value, moment))
    else:
        moment.copy_(value)
    return moment


@torch.no_grad()
def _restore_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Read this rank's part of the files straight into model and optimiser."""
    sizes = shards.sizes(folder)
    weights, moments = folders.split({name: size for name, (size, _) in sizes.items()})
    own = _own(model, teacher=False)
    _check(folder, weights, _shapes(own))
    targets = {folders.MODEL_PREFIX + name: tensor for name, tensor in own.items()}
    owners = {} if optimizer is None else _owners(folder, moments, model)
    for key, (_, parameter) in owners.items():
        name = folders.OPTIMIZER_PREFIX + key
        targets[name] = _empty_moment(*sizes[name], parameter)
    shards.load(folder, targets)
    if optimizer is not None:
        for key, (kind, parameter) in owners.items():
            optimizer.state[parameter][kind] = targets[folders.OPTIMIZER_PREFIX + key]


def save_teacher(run: Path, model: nn.Module) -> dict[str, Any] | None:
    """Store the frozen teacher once for the run; its size and checksum, None where the model has none."""
    content = _teacher_bytes(model)
    return write_file(run / _TEACHER_FILE, content) if content else None


def _teacher_bytes(model: nn.Module) -> bytes:
    teacher = _own(model, teacher=True)
    tensors = _host({name.removeprefix(TEACHER): tensor for name, tensor in teacher.items()})
    return safetensors.torch.save(tensors) if tensors else b""


def mend_teacher(
    run: Path, line: dict[str, Any] | None, model: nn.Module, load: Callable[[], None], source: str
) -> bool:
    """Write the run's stored teacher again if it is damaged; whether it was.

    Args:
        line:   the size and checksum it must have; None: the run has no teacher.
        load:   puts the teacher that the options name into `model`; called only if the file is damaged.
        source: what the options name, for the messages.
    Raises:
        CheckpointError: it is damaged, and what the options name has other weights.
        LmimError: it cannot be read, or `load` failed.
    """
    path = run / _TEACHER_FILE
    if line is None:
        return False
    try:
        check_file(path, line)
    except CheckpointError as damage:
        advice = (
            f"pass --teacher the file that the run began with, and {path.name} is written again; "
            "or copy it from a backup of the run folder"
        )
        try:
            load()
        except LmimError as error:
            raise CheckpointError(
                f"{damage}, and --teacher {source} cannot take its place: {error}; {advice}"
            ) from error
        content = _teacher_bytes(model)
        if hashlib.sha256(content).hexdigest() != line["sha256"]:
            raise CheckpointError(f"{damage}, and --teacher {source} has other weights; {advice}") from damage
        write_file(path, content)
        return True
    return False


def load_teacher(run: Path, line: dict[str, Any] | None, model: nn.Module) -> None:
    """Put the run's stored teacher into `model`; `line` is the size and checksum it must have.

    Raises:
        CheckpointError: it is missing, altered, or of another size.
        LmimError: it cannot be read.
    """
    if line is None:
        return
    try:
        stored = read_checked(run / _TEACHER_FILE, line)
    except CheckpointError as damage:
        raise CheckpointError(
            f"{damage}; the training command of the run, with its --teacher, writes the file again"
        ) from damage
    tensors = safetensors.torch.load(stored)
    named = {TEACHER + name: tensor for name, tensor in tensors.items()}
    _load(run / _TEACHER_FILE, named, model, teacher=True)
