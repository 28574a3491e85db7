"""From a config to a model, and what it was made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

import torch
from torch import nn

import lmim_fast
from lmim_fast.config import PretrainConfig
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE

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
