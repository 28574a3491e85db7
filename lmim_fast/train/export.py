"""Weights from one file layout into another: `lmim convert`."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lmim_fast.config import RunConfig
from lmim_fast.config.io import run_from_dict
from lmim_fast.errors import CheckpointError, UsageError
from lmim_fast.models import weights
from lmim_fast.models.weight_names import split_key
from lmim_fast.train.checkpoint import content, folders
from lmim_fast.train.checkpoint.files import write_file
from lmim_fast.train.tasks import make_task

Layout = Literal["released", "encoder"]
_RELEASED_FFN = 2048  # of torch's decoder layer, which the released code leaves at its default
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
        step:   checkpoint of a run folder; None: the newest whole one.
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
    state, notes = _state_of_run(source, step) if source.is_dir() else _state_of_file(source, step)
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
    _say(target, [*notes, *_not_of_the_release(state)])
    return target


def _say(target: Path, notes: list[str]) -> None:
    for note in notes:
        print(f"{target}: {note}", file=sys.stderr)


def _not_of_the_release(state: Mapping[str, Tensor]) -> list[str]:
    """Why the released class cannot hold these tensors: all but this size is an argument of it."""
    pattern = re.compile(r"decoder_blocks\.\d+\.linear1\.weight")
    wrong = {name: list(value.shape) for name, value in state.items() if pattern.fullmatch(name)}
    wrong = {name: shape for name, shape in wrong.items() if shape[0] != _RELEASED_FFN}
    if not wrong:
        return []
    name, shape = next(iter(wrong.items()))
    return [
        f"warning: the released class cannot load it: its decoder's feed-forward is {_RELEASED_FFN} wide, "
        f"here it is {shape[0]} ({name} {shape}); this package loads it, and a run with --model.decoder-ffn "
        f"{_RELEASED_FFN} fits the released class"
    ]


def _state_of_run(source: Path, step: int | None) -> tuple[dict[str, Tensor], list[str]]:
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
    model, _ = load_model(source, step)
    return weights.to_released(model), []


def _state_of_file(source: Path, step: int | None) -> tuple[dict[str, Tensor], list[str]]:
    if step is not None:
        raise UsageError(f"--step {step} is for run folders, {source} is a file")
    found = weights.read_weights(source)
    return found.state, list(found.notes)


def load_model(run_folder: str | Path, step: int | None = None) -> tuple[nn.Module, RunConfig]:
    """A run's model, teacher included, in eval mode on the CPU, and the run's config.

    Args:
        run_folder: run folder.
        step: the checkpoint to take; None takes the newest whole one.
    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    run = Path(run_folder)
    problems: list[str] = []
    if step is None:
        checkpoint = folders.newest(run, lambda _, error: problems.append(str(error)))
    else:
        checkpoint = folders.read(folders.folder_of(run, step))
    if checkpoint is None:
        raise CheckpointError("; ".join([f"{run} has no usable checkpoint", *problems]))
    config = run_from_dict(checkpoint.state["config"])
    model = make_task(config).build()
    content.restore(checkpoint, model)
    content.load_teacher(run, checkpoint.state["teacher"], model)
    return model.eval(), config
