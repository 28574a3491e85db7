"""Third-party models that `accelerate` is checked and timed on, with random weights.

A builder imports its library when it is called: a model whose library is missing raises ImportError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accelerated import transformers, vision
from benchmarks.accelerated.sizes import SIZES, Size

__all__ = ["MODELS", "SIZES", "Size", "Subject", "subject", "tensors"]


@dataclass
class Subject:
    """A model and what it is called with.

    inputs:  by position: images (B, 3, S, S), sequences (B, N, D) or token ids (B, N).
    options: further arguments by name.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    options: dict[str, Any]

    def __call__(self) -> list[Tensor]:
        """Every floating tensor that the model returns."""
        return tensors(self.model(*self.inputs, **self.options))


MODELS = vision.MODELS | transformers.MODELS


def subject(name: str, size: Size, *, random: bool = False, dtype: torch.dtype = torch.float32) -> Subject:
    """The model `name` at a size, in training mode, with weights off their initial values.

    Args:
        name:   of `MODELS`.
        size:   of `SIZES`, or another.
        random: keep the model's own dropout and drop path; False: both are 0.
        dtype:  of parameters and of floating inputs.
    Raises:
        ImportError: the library is not installed.
    """
    torch.manual_seed(0)
    model, inputs, options = MODELS[name](size, random)
    _move(model)
    model.to(dtype).train()
    cast = tuple(each.to(dtype) if each.is_floating_point() else each for each in inputs)
    options = {key: value.to(dtype) if _is_real(value) else value for key, value in options.items()}
    return Subject(model, cast, options)


def tensors(value: Any) -> list[Tensor]:
    """The floating tensors in tuples, lists, dicts and dataclasses of them, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):  # of Hugging Face too
        value = list(value.values())
    return [each for part in value for each in tensors(part)] if isinstance(value, list | tuple) else []


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@torch.no_grad()
def _move(model: nn.Module) -> None:
    """Give matrices and embeddings variance 1 / fan-in, and move vectors."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
