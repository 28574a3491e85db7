"""Weights into models and out of them.

Encoder files may be a released LMIM checkpoint (`model_maeenc.*`), a MAERec or MAE one (names without prefix,
`decoder*` beside them), a plain encoder file as `save_encoder` writes it, or one of timm's ViT; the names may
have a prefix. `FILE::KEY` names one of several models in a file. `weight_files` reads files, `weight_names`
finds a model in them, `weight_checks` says what is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lmim_fast import durable
from lmim_fast.errors import WeightsError
from lmim_fast.models.weight_checks import check_entering, check_finite, check_layout, check_positions
from lmim_fast.models.weight_files import read_content, with_step
from lmim_fast.models.weight_names import (
    RECOGNIZER,
    STUDENT,
    Weights,
    find_weights,
    name_list,
    prefixes,
    split_key,
)

_DECODERS = ("decoder", "mask_token")  # of LMIM and MAE
_HEADS = ("head.", "head_dist.", "fc.", "classifier.", "pre_logits.")  # behind the last norm of a ViT


@dataclass(frozen=True)
class LoadReport:
    """The kind of a file, names of the tensors that were loaded and ignored, and what is to be said of it."""

    kind: str
    loaded: tuple[str, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_weights(source: str | os.PathLike[str]) -> Weights:
    """The tensors of the model in `FILE` or `FILE::KEY`, without the prefix that they all have there.

    Raises:
        WeightsError: no such file, no weights, or none of one model; says what to do.
    """
    path, key = split_key(os.fspath(source))
    return find_weights(read_content(path), key, path)


def read_state_dict(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """As `read_weights`; the tensors alone."""
    return read_weights(source).state


def load_released(
    source: str | os.PathLike[str] | Mapping[str, Tensor], model: nn.Module, name: str | None = None
) -> LoadReport:
    """Load a whole state dict under its released names.

    Args:
        source: checkpoint file or state dict.
        model:  `LMIM`, `MAE`, `Recognizer` or a reference; changed in place, only if everything fits.
        name:   what an error calls the source.
    Raises:
        WeightsError: tensors are missing, left over or misshaped; the message lists names and shapes.
    """
    state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
    _load(state, model, name or ("state dict" if isinstance(source, Mapping) else str(source)))
    return LoadReport("released", tuple(state), ())


def to_released(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under the released names, detached, on the CPU, contiguous.

    Raises:
        WeightsError: a tensor holds a value that is not finite.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    check_finite(state)
    return state


def encoder_state(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """Kind of a state dict, its encoder tensors without prefix, and the names of all others.

    Raises:
        WeightsError: the state dict has no encoder.
    """
    state = dict(state)
    if STUDENT + "cls_token" in state:
        kind, prefix = "LMIM", STUDENT
    elif RECOGNIZER + "cls_token" in state:
        kind, prefix = "recognizer", RECOGNIZER
        if "pos_embed" in state:  # files with one copy of each tensor have it under its first name
            state.setdefault(RECOGNIZER + "pos_embed", state["pos_embed"])
    elif "cls_token" in state:
        kind, prefix = ("MAE" if any(name.startswith("decoder") for name in state) else "encoder"), ""
    else:
        raise WeightsError(
            f"no encoder (cls_token beside patch_embed.proj.weight and blocks.0.*, as timm names them) among "
            f"its {len(state)} tensors: {name_list(list(state))}; they begin with {prefixes(list(state))}"
        )
    foreign = _DECODERS + _HEADS
    chosen = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(foreign)
    }
    used = {prefix + name for name in chosen}
    return kind, chosen, tuple(name for name in state if name not in used)


def load_encoder(
    source: str | os.PathLike[str] | Weights,
    encoder: nn.Module,
    *,
    keep_positions: bool = False,
    name: str | None = None,
) -> LoadReport:
    """Load the encoder of a released LMIM, a MAERec/MAE, a recogniser, a timm ViT or a plain encoder file.

    Args:
        source:         `FILE`, `FILE::KEY` or what `read_weights` gave; of an LMIM file the student is taken.
        encoder:        `Encoder` (such as `model.model_maeenc_momentum`) or `MAE`, without its decoder.
        keep_positions: refuse the sin-cos table of another grid. A teacher keeps the table that it was
                        trained with, a student should have its decoder's grid. A learned table is loaded.
        name:           what messages call the source.
    Raises:
        WeightsError: unreadable file; missing, extra or misshaped tensors, with names and shapes; values that
            are not finite.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    label = name or ("weights" if isinstance(source, Weights) else os.fspath(source))
    try:
        kind, state, ignored = encoder_state(weights.state)
    except WeightsError as error:
        raise WeightsError(f"{label}: {error}") from error
    notes = [*weights.notes, *_left_out(ignored)]
    positions = encoder.state_dict()["pos_embed"]
    if keep_positions and "pos_embed" in state and state["pos_embed"].shape == positions.shape:
        check_entering(state, label)
        notes += check_positions(state["pos_embed"], positions, label)
    _load(state, encoder, label, only=set(_encoder_names(encoder)))
    return LoadReport(kind, tuple(state), ignored, tuple(notes))


def _left_out(ignored: tuple[str, ...]) -> list[str]:
    heads = [name for name in ignored if name.startswith(_HEADS)]
    return [f"left out {name_list(heads)}: no part of the encoder"] if heads else []


def encoder_safetensors(state: Mapping[str, Tensor], step: int | None = None) -> bytes:
    """The (student) encoder in a state dict as the bytes of a safetensors file, which `load_encoder` takes.

    Args:
        state: of a whole model, or of an encoder.
        step:  steps of the run that it is of, which the file then says.
    Raises:
        WeightsError: the state dict has no encoder, or one of another layout.
    """
    from safetensors.torch import save

    _, encoder, _ = encoder_state(state)
    check_layout(encoder)
    content: bytes = save({name: value.contiguous() for name, value in encoder.items()}, {"format": "pt"})
    return content if step is None else with_step(content, step)


def left_out_of_encoder(state: Mapping[str, Tensor]) -> list[str]:
    """What is to be said of tensors that `encoder_safetensors` leaves out."""
    return _left_out(encoder_state(state)[2])


def save_encoder(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the (student) encoder of `model` as plain safetensors, atomically.

    Raises:
        WeightsError: a tensor holds a value that is not finite, or the model has no encoder.
        OSError: the file cannot be written.
    """
    target = Path(path)
    durable.write_file(target, encoder_safetensors(to_released(model)))
    return target


def _encoder_names(encoder: nn.Module) -> list[str]:
    return [name for name in encoder.state_dict() if not name.startswith(_DECODERS)]


def _load(state: dict[str, Tensor], module: nn.Module, source: str, only: set[str] | None = None) -> None:
    """Copy `state` into `module`, only if all names and shapes match and all values are finite."""
    expected = {name: value for name, value in module.state_dict().items() if only is None or name in only}
    missing = [f"{name} {list(value.shape)}" for name, value in expected.items() if name not in state]
    extra = [f"{name} {list(value.shape)}" for name, value in state.items() if name not in expected]
    misshaped = [
        f"{name} {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    problems = [
        f"{len(names)} {word}: {name_list(names)}"
        for word, names in (("missing", missing), ("extra", extra), ("misshaped", misshaped))
        if names
    ]
    if problems:
        if missing and extra:
            problems.append(f"its names begin with {prefixes(list(state))}")
        if sizes := _sizes(state):
            problems.append(f"its encoder has {sizes}")
        raise WeightsError(f"{source} does not fit the model; " + "; ".join(problems))
    check_entering(state, source)
    module.load_state_dict(state, strict=only is None)


def _sizes(state: Mapping[str, Tensor]) -> str:
    """Sizes of the encoder in a state dict, as the options name them; empty without one."""
    try:
        _, encoder, _ = encoder_state(state)
        width, _, patch, _ = encoder["patch_embed.proj.weight"].shape
        patches = encoder["pos_embed"].shape[1] - 1
    except (WeightsError, KeyError, ValueError, IndexError):
        return ""
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    return f"width {width}, depth {depth}, {patches} patches of size {patch}"
