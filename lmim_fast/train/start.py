"""What `--teacher` and `--init` name: encoder files, run folders, or a random teacher."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import lmim_fast
from lmim_fast.config import PretrainConfig
from lmim_fast.errors import UsageError, shared
from lmim_fast.models import weights
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.train.checkpoint import folders

NO_TEACHER = (
    "no teacher: pass --teacher FILE (an encoder from `--objective mae`, a released LMIM or MAERec file) "
    "or --teacher random for an ablation"
)


def check_teacher(config: PretrainConfig) -> None:
    """Refuse a run whose teacher was forgotten.

    Raises:
        UsageError: the objective needs a teacher and none is named, or one is named that nothing reads.
    """
    if needs_teacher(config) and config.teacher is None:
        raise shared(UsageError(NO_TEACHER))
    if config.teacher is not None and not needs_teacher(config):
        reason = "--objective mae" if config.objective == "mae" else f"--model.target {config.model.target}"
        message = f"--teacher {config.teacher}: {reason} has no teacher; leave the option out"
        raise shared(UsageError(message))


def encoder_of(model: nn.Module) -> nn.Module:
    """The student encoder: inside LMIM, or MAE itself."""
    return model.model_maeenc if isinstance(model, LMIM) else model


def encoder_file(name: str) -> Path:
    """The file of an encoder: the one named, or of a run folder its encoder, or else its newest checkpoint.

    Raises:
        UsageError: there is no such file, or the folder holds neither.
    """
    path = Path(name)
    if not path.exists():
        raise UsageError(f"{name} does not exist; it should be an encoder file or a run folder")
    if path.is_file():
        return path
    if (path / "encoder.safetensors").is_file():
        return path / "encoder.safetensors"
    latest = folders.latest(path)
    if latest is None:
        raise UsageError(
            f"{name} has no encoder.safetensors and no checkpoint: it is not the folder of a run"
        )
    return latest / folders.MODEL_FILE


def load_starting_weights(config: PretrainConfig, model: nn.Module, tell: Callable[[str], None]) -> None:
    """Load what `--init` and `--teacher` name.

    Raises:
        UsageError: a path does not exist.
        WeightsError: a file does not fit; lists names and shapes.
    """
    if config.init is not None:
        weights.load_encoder(encoder_file(config.init), encoder_of(model), keep_positions=True)
        tell(f"student starts from {config.init}")
    if not needs_teacher(config):
        return
    if config.teacher == "random":
        tell("warning: the teacher is random (--teacher random): an ablation, not a recipe")
        return
    path = encoder_file(str(config.teacher))
    weights.load_encoder(path, model.get_submodule("model_maeenc_momentum"))
    tell(f"teacher {path}")


# Those that can change a number; of each family the one that is installed.
_PACKAGES = (
    *("torch", "triton", "numpy", "lmdb", "safetensors"),
    *("opencv-python-headless", "opencv-python", "nvidia-dali-cuda120", "nvidia-dali-cuda130"),
)


def build_model(config: PretrainConfig) -> nn.Module:
    """The model of a run, on the CPU, with the weights that its seed gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LMIM(config.model) if config.objective == "lmim" else MAE(config.model)


def needs_teacher(config: PretrainConfig) -> bool:
    """Whether the run reconstructs a teacher's features."""
    return config.objective == "lmim" and config.model.target == "teacher"


def versions() -> dict[str, str]:
    """What the run was made with."""
    found = {"lmim_fast": lmim_fast.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
