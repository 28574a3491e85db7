"""What users attach to a part of a layer (adapters, hooks, pruning, norms of weights), and how it goes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

Undo = Callable[[], object]


class Lora(nn.Module):
    """A part beside a trained low-rank path from its first input."""

    def __init__(self, base: nn.Module, width: int, out: int) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, out, bias=False)

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        return on_first(self.base(x, *more, **named), lambda result: result + self.up(self.down(x)))


def on_first(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The change of a tensor, or of the first of a tuple."""
    return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)


def replace(layer: nn.Module, name: str, part: nn.Module) -> Undo:
    holder, _, last = name.rpartition(".")
    before = layer.get_submodule(name)
    setattr(layer.get_submodule(holder), last, part)
    return lambda: setattr(layer.get_submodule(holder), last, before)


def lora(layer: nn.Module, name: str) -> Undo:
    part = layer.get_submodule(name)
    width = next(part.parameters()).shape[-1]  # of an attention or an MLP, that of its first linear
    return replace(
        layer, name, Lora(part, width, part.out_features if isinstance(part, nn.Linear) else width)
    )


def sequential(layer: nn.Module, name: str) -> Undo:
    return replace(layer, name, nn.Sequential(layer.get_submodule(name), nn.Tanh()))


def forward_hook(layer: nn.Module, name: str) -> Undo:
    part = layer.get_submodule(name)
    return part.register_forward_hook(lambda _, inputs, output: on_first(output, lambda x: 2 * x)).remove


def pre_hook(layer: nn.Module, name: str) -> Undo:
    part = layer.get_submodule(name)
    return part.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 2, *inputs[1:])).remove


def backward_hook(layer: nn.Module, name: str) -> Undo:
    part = layer.get_submodule(name)
    return part.register_full_backward_hook(lambda _, grads, up: (3 * grads[0], *grads[1:])).remove


def backward_pre_hook(layer: nn.Module, name: str) -> Undo:
    part = layer.get_submodule(name)
    return part.register_full_backward_pre_hook(lambda _, up: (3 * up[0], *up[1:])).remove


def pruning(layer: nn.Module, name: str) -> Undo:
    part = layer.get_submodule(name)
    prune.l1_unstructured(part, "weight", 0.4)
    return lambda: prune.remove(part, "weight")


def weight_norm_hook(layer: nn.Module, name: str) -> Undo:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # deprecated, and in wide use
        part = old_weight_norm(layer.get_submodule(name))
    return lambda: remove_weight_norm(part)


def spectral_norm_hook(layer: nn.Module, name: str) -> Undo:
    part = old_spectral_norm(layer.get_submodule(name))
    return lambda: remove_spectral_norm(part)


def parametrization(layer: nn.Module, name: str) -> Undo:
    part = parametrizations.weight_norm(layer.get_submodule(name))
    return lambda: parametrize.remove_parametrizations(part, "weight")


def compiled(layer: nn.Module, name: str) -> Undo:
    """torch.compile of the part by a backend that doubles its result."""

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        return lambda *inputs: tuple(2 * result for result in graph(*inputs))

    part = layer.get_submodule(name)
    part.compile(backend=backend)
    return lambda: setattr(part, "_compiled_call_impl", None)


def patched(layer: nn.Module, name: str) -> Undo:
    part = layer.get_submodule(name)
    forward = part.forward
    part.forward = lambda *inputs, **named: on_first(forward(*inputs, **named), torch.tanh)
    return lambda: part.__dict__.pop("forward")


def on_all(layer: nn.Module, name: str) -> Undo:
    """A hook on all modules of the process that acts on this one."""
    part = layer.get_submodule(name)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return on_first(output, lambda x: 2 * x) if module is part else None

    return torch.nn.modules.module.register_module_forward_hook(hook).remove


OF_ANY = {
    "lora": lora,
    "forward hook": forward_hook,
    "pre-hook": pre_hook,
    "patched forward": patched,
    "hook on all": on_all,
}
OF_LINEARS = {
    **OF_ANY,
    "sequential": sequential,
    "backward hook": backward_hook,
    "backward pre-hook": backward_pre_hook,
    "pruning": pruning,
    "weight norm": weight_norm_hook,
    "spectral norm": spectral_norm_hook,
    "parametrization": parametrization,
    "compiled": compiled,
}
