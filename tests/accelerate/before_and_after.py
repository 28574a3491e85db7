"""A model with its fast forms beside one without: outputs and gradients of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate_models import MaskedAutoencoder
from foreign_layers import LIKE as LAYERS_LIKE
from torch import Tensor, nn

from lmim_fast.layers.accelerate import AccelerationReport, accelerate

LIKE = LAYERS_LIKE | {MaskedAutoencoder: "mae.random_masking"}


def accelerated(model: nn.Module, **options: Any) -> AccelerationReport:
    """`accelerate`, which takes the stand-ins for what they stand for."""
    return accelerate(model, **{"like": LIKE} | options)


def bound(model: nn.Module) -> list[str]:
    """Names of the layers with a fast forward."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def run(module: nn.Module, *inputs: Any, **named: Any) -> dict[str, Tensor]:
    """Output, and gradients of the inputs and of all trained parameters."""
    copies = {id(x): x.detach().clone() for x in inputs if isinstance(x, Tensor)}
    trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
    for number, x in enumerate(each for each in copies.values() if each.is_floating_point()):
        trained[f"input {number}"] = x.requires_grad_(torch.is_grad_enabled())
    torch.manual_seed(3)
    output = module(*(copies.get(id(x), x) for x in inputs), **named)
    output = output[0] if isinstance(output, tuple) else output
    results = {"output": output.detach()}
    if output.requires_grad:
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
        gradients = torch.autograd.grad(output, list(trained.values()), upstream, allow_unused=True)
        results |= {name: each for name, each in zip(trained, gradients, strict=True) if each is not None}
    return results


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """L2 errors relative to each tensor, or to 1 % of the largest if that is more.

    Softmax does not see the bias of the keys: its gradient is rounding alone.
    """
    assert found.keys() == expected.keys()
    norms = {name: each.norm().item() for name, each in expected.items()}
    floor = max(1e-2 * max(norms.values()), 1e-30)
    return {
        name: (found[name].to(each) - each).norm().item() / max(norms[name], floor)
        for name, each in expected.items()
    }


class Swapped:
    """A layer with its fast forms, and a copy without."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        self.original, self.layer = copy.deepcopy(layer), layer
        self.report = accelerated(layer, **options)

    @property
    def note(self) -> str:
        """What the report says of the outermost layer."""
        return self.report.rows[0].note

    @property
    def notes(self) -> set[str]:
        """Of the swapped layers."""
        return {row.note for row in self.report.swapped} - {"", "its random_masking"}

    def both(self, change: Callable[[Any], object]) -> Swapped:
        """The same change of both."""
        for each in (self.layer, self.original):
            torch.manual_seed(0)
            change(each)
        return self

    def check(self, *inputs: Any, tolerance: float = 1e-5, **named: Any) -> None:
        """Both give the same result and gradients."""
        found, expected = (run(each, *inputs, **named) for each in (self.layer, self.original))
        assert found["output"].dtype == expected["output"].dtype
        for name, error in errors(found, expected).items():
            assert error <= tolerance, name
