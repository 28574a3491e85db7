"""Released weights in and out. Only tensors and argparse.Namespace are ever unpickled.

Encoder files may be a released LMIM checkpoint (`model_maeenc.*`), a MAERec or MAE one (names without prefix,
`decoder*` beside them) or a plain encoder safetensors file as `save_encoder` writes it.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lmim_fast import durable
from lmim_fast.errors import WeightsError

STUDENT, TEACHER, RECOGNIZER = "model_maeenc.", "model_maeenc_momentum.", "encoder."
MAX_NAMED = 12  # names that an error lists


@dataclass(frozen=True)
class LoadReport:
    """The kind of a file, the names of the tensors that were loaded, and of those that were ignored."""

    kind: str
    loaded: tuple[str, ...]
    ignored: tuple[str, ...]


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint file: `{"model": ...}`, `{"module": ...}`, a bare state dict, or safetensors.

    Raises:
        WeightsError: no such file, not a checkpoint, or one with objects other than tensors and a Namespace.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no checkpoint file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message advises to load it unsafely
        raise WeightsError(
            f"{path} was not read: it is no checkpoint, or holds objects other than tensors and "
            "argparse.Namespace, which could run code"
        ) from error
    except Exception as error:  # damaged bytes are opcodes to the unpickler: any error may follow
        raise WeightsError(f"{path} is not a readable checkpoint: {_first_line(error)}") from error
    for key in ("model", "module", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors; its keys are {', '.join(map(str, list(content)[:MAX_NAMED]))}"
        )
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


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


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse weights with values that are not finite.

    Raises:
        WeightsError: a tensor holds a value that is not finite.
    """
    broken = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise WeightsError(f"not exported: non-finite values in {_names(broken)}")


def encoder_state(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """Kind of a state dict, its encoder tensors without prefix, and the names of all others.

    Raises:
        WeightsError: the state dict has no encoder.
    """
    if STUDENT + "cls_token" in state:
        kind, prefix = "LMIM", STUDENT
    elif RECOGNIZER + "cls_token" in state:
        kind, prefix = "recognizer", RECOGNIZER
    elif "cls_token" in state:
        kind, prefix = ("MAE" if any(name.startswith("decoder") for name in state) else "encoder"), ""
    else:
        raise WeightsError(f"no encoder (cls_token) among its tensors: {_names(list(state))}")
    foreign = ("decoder", "mask_token")
    chosen = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(foreign)
    }
    used = {prefix + name for name in chosen}
    return kind, chosen, tuple(name for name in state if name not in used)


def load_encoder(
    path: str | os.PathLike[str], encoder: nn.Module, *, keep_positions: bool = False
) -> LoadReport:
    """Load the encoder of a released LMIM, a MAERec/MAE or a plain encoder file.

    Args:
        path:           checkpoint file; from an LMIM file the student is loaded.
        encoder:        `Encoder` (such as `model.model_maeenc_momentum`) or `MAE`, without its decoder.
        keep_positions: refuse a file whose position table differs from the encoder's. A teacher keeps the
                        table it was trained with; a student must have the table of its decoder.
    Raises:
        WeightsError: unreadable file, or missing, extra or misshaped tensors, with names and shapes.
    """
    kind, state, ignored = encoder_state(read_state_dict(path))
    positions = encoder.state_dict()["pos_embed"]
    if keep_positions and "pos_embed" in state and state["pos_embed"].shape == positions.shape:
        difference = float((state["pos_embed"].float() - positions.cpu()).abs().max())
        if difference > 1e-3:
            raise WeightsError(
                f"{path} was trained with other positions (its pos_embed differs by {difference:.2g}); "
                "set --model.pos-grid (--model.encoder.pos-grid) to the file's, released or true"
            )
    _load(state, encoder, str(path), only=set(_encoder_names(encoder)))
    return LoadReport(kind, tuple(state), ignored)


def encoder_safetensors(state: Mapping[str, Tensor]) -> bytes:
    """The (student) encoder in a state dict as the bytes of a plain safetensors file.

    Raises:
        WeightsError: the state dict has no encoder.
    """
    from safetensors.torch import save

    _, encoder, _ = encoder_state(state)
    content: bytes = save({name: value.contiguous() for name, value in encoder.items()}, {"format": "pt"})
    return content


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
    return [name for name in encoder.state_dict() if not name.startswith(("decoder", "mask_token"))]


def _load(state: dict[str, Tensor], module: nn.Module, source: str, only: set[str] | None = None) -> None:
    """Copy `state` into `module`, only if all names and shapes match."""
    expected = {name: value for name, value in module.state_dict().items() if only is None or name in only}
    missing = [f"{name} {list(value.shape)}" for name, value in expected.items() if name not in state]
    extra = [f"{name} {list(value.shape)}" for name, value in state.items() if name not in expected]
    misshaped = [
        f"{name} {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    problems = [
        f"{len(names)} {word}: {_names(names)}"
        for word, names in (("missing", missing), ("extra", extra), ("misshaped", misshaped))
        if names
    ]
    if problems:
        raise WeightsError(f"{source} does not fit the model; " + "; ".join(problems))
    module.load_state_dict(state, strict=only is None)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _names(names: list[str]) -> str:
    listed = ", ".join(names[:MAX_NAMED])
    return listed if len(names) <= MAX_NAMED else f"{listed} and {len(names) - MAX_NAMED} more"
