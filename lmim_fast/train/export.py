"""Weights from one file layout into another: `lmim convert`."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lmim_fast.config import RunConfig
from lmim_fast.config.io import run_from_dict
from lmim_fast.errors import CheckpointError, UsageError
from lmim_fast.models import weights
from lmim_fast.models.recognizer_files import describes_itself, is_recognizer, load_recognizer
from lmim_fast.models.weight_names import split_key
from lmim_fast.train import released
from lmim_fast.train.checkpoint import content, folders
from lmim_fast.train.checkpoint.files import write_file
from lmim_fast.train.checkpoint.folders import Checkpoint
from lmim_fast.train.run_weights import averages_told, checkpoint_tensors
from lmim_fast.train.tasks import make_task

Layout = Literal["released", "encoder"]
_LAYOUT_OF_SUFFIX: dict[str, Layout] = {".pth": "released", ".pt": "released", ".safetensors": "encoder"}


def convert(
    source: str | Path, target: str | Path, *, to: Layout | None = None, step: int | None = None
) -> Path:
    """Write the weights of `source` to the file `target`.

    Args:
        source: run folder, one of its checkpoint folders, or a file: released LMIM, MAERec, or ours.
        target: file to write; it must not exist.
        to:     "released": `{"model": state_dict}` by `torch.save`, teacher included, under the names of the
                released LMIM (of an MAE run: MAERec's); "encoder": the student encoder as plain
                safetensors; None: by the suffix of `target`.
        step:   checkpoint of a run folder; None: the newest whole one. Of a run that keeps an average of its
                weights the average is taken, as the run itself exports it.
    Returns:
        The file written.
    Raises:
        UsageError: a path or step that does not fit, or a layout that `source` does not hold enough for.
        CheckpointError, WeightsError: the source is damaged or its weights are not finite.
    """
    source, target = Path(source), Path(target)
    layout = to or _LAYOUT_OF_SUFFIX.get(target.suffix)
    if layout is None:
        raise UsageError(f"{target}: pass --to released or --to encoder, the suffix names neither")
    if target.exists():
        raise UsageError(f"{target} exists; choose another name")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is not a folder")
    if not split_key(source)[0].exists():
        raise UsageError(f"{source} does not exist; it should be a run folder or a checkpoint file")
    state, notes, lost = _state_of_run(source, step) if source.is_dir() else _state_of_file(source, step)
    weights.check_finite(state)
    if layout == "encoder":
        notes += weights.left_out_of_encoder(state)
        write_file(target, weights.encoder_safetensors(state))
        _say(target, notes)
        return target
    if not any(name.startswith("decoder") for name in state):
        raise UsageError(f"{source} holds an encoder only; the released layout needs a whole model")
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    write_file(target, buffer.getvalue())
    _say(target, [*notes, *released.of_tensors(state), *lost])
    return target


def _say(target: Path, notes: list[str]) -> None:
    for note in notes:
        print(f"{target}: {note}", file=sys.stderr)


def _state_of_run(source: Path, step: int | None) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The weights, what is to be said of them, and of them in the released layout."""
    if source.parent.name == "checkpoints" and source.name.startswith("step-"):
        if step is not None or not folders.is_finished_name(source.name):
            raise UsageError(
                f"{source}: name the run folder and --step, or a finished checkpoint folder, which is called "
                "like step-00000300"
            )
        source, step = source.parent.parent, folders.step_of(source)
    steps = folders.steps(source)
    if not steps:
        raise UsageError(f"{source} has no checkpoint: it is not the folder of a run")
    if step is not None and step not in steps:
        choices = ", ".join(map(str, sorted(steps)))
        raise UsageError(f"{source} has no checkpoint of step {step}; --step may be {choices}")
    checkpoint, problems = _read(source, step)
    averages = averages_told(checkpoint)
    if averages:
        checkpoint = dataclasses.replace(checkpoint, model=checkpoint_tensors(checkpoint))
    model, _ = _model_of(source, checkpoint)
    notes = [*problems, ", ".join([f"step {checkpoint.state['step']} of {source}", *averages])]
    return weights.to_released(model), notes, released.of_model(model)


def _state_of_file(source: Path, step: int | None) -> tuple[dict[str, Tensor], list[str], list[str]]:
    if step is not None:
        raise UsageError(f"--step {step} is for run folders, {source} is a file")
    found = weights.read_weights(source)
    if is_recognizer(found.state) and describes_itself(source):  # the file has one copy of each tensor
        model = load_recognizer(source)
        return weights.to_released(model), list(found.notes), released.of_model(model)
    return found.state, list(found.notes), []


def load_model(run_folder: str | Path, step: int | None = None) -> tuple[nn.Module, RunConfig]:
    """A run's model, teacher included, in eval mode on the CPU, and the run's config.

    Args:
        run_folder: run folder.
        step: the checkpoint to take; None takes the newest whole one.
    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    checkpoint, _ = _read(Path(run_folder), step)
    model, config = _model_of(Path(run_folder), checkpoint)
    return model.eval(), config


def _read(run: Path, step: int | None) -> tuple[Checkpoint, list[str]]:
    """A checkpoint of a run, and what is wrong with newer ones."""
    problems: list[str] = []
    if step is None:
        checkpoint = folders.newest(run, lambda _, error: problems.append(str(error)))
    else:
        checkpoint = folders.read(folders.folder_of(run, step))
    if checkpoint is None:
        raise CheckpointError("; ".join([f"{run} has no usable checkpoint", *problems]))
    return checkpoint, problems


def _model_of(run: Path, checkpoint: Checkpoint) -> tuple[nn.Module, RunConfig]:
    config = run_from_dict(checkpoint.state["config"])
    model = make_task(config).build()
    content.restore(checkpoint, model)
    content.load_teacher(run, checkpoint.state["teacher"], model)
    return model, config
