"""Compilers, exporters and transforms of torch.func and autograd around an accelerated model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.accelerated.models import Subject, tensors
from benchmarks.accelerated.wrappers import FIRST, wrapper

GRAPHS: dict[str, Callable[[Any], list[str]]] = {}
"""Of wrappers that trace a model: the operators of their graph, from what the wrapper returned."""


class Compiled(nn.Module):
    """A model under torch.compile, and the operators of its forward graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.operators: list[str] = []
        torch.compiler.reset()
        self.compiled = torch.compile(model, fullgraph=True, backend=self._record)

    def _record(self, graph: Any, inputs: Any) -> Any:
        self.operators += _operators(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The compiled model."""
        return self.compiled(*arguments, **named)


@wrapper("torch.compile, fullgraph", FIRST)
def _compiled(each: Subject) -> nn.Module:
    return Compiled(each.model)


GRAPHS["torch.compile, fullgraph"] = lambda module: module.operators


@wrapper("torch.export", FIRST)
def _exported(each: Subject) -> nn.Module:
    module: nn.Module = torch.export.export(each.model, each.inputs, each.options).module()
    return module


def _operators(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


GRAPHS["torch.export"] = _operators


@wrapper("torch.jit.trace", FIRST)
def _traced(each: Subject) -> nn.Module:
    traced: nn.Module = torch.jit.trace(each.model, each.inputs, check_trace=False)
    return traced


GRAPHS["torch.jit.trace"] = lambda module: [node.kind() for node in module.inlined_graph.nodes()]


class Ensemble(nn.Module):
    """Two models of other weights under vmap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base = [model]
        stacked = {
            name: torch.stack([value.detach(), 1.5 * value.detach()])
            for name, value in model.named_parameters()
        }
        self.stacked = nn.ParameterDict({name.replace(".", "/"): value for name, value in stacked.items()})

    def forward(self, *arguments: Any, **named: Any) -> list[Tensor]:
        """Outputs of both models, stacked."""

        def call(weights: dict[str, Tensor]) -> list[Tensor]:
            return tensors(torch.func.functional_call(self.base[0], weights, arguments, named))

        weights = {name.replace("/", "."): value for name, value in self.stacked.items()}
        return torch.func.vmap(call, randomness="different")(weights)


@wrapper("vmap over weights", FIRST)
def _vmapped(each: Subject) -> nn.Module:
    return Ensemble(each.model)


class Batched(nn.Module):
    """A model whose output is joined by two gradients of it that are taken at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Tensor, **named: Any) -> list[Tensor]:
        """Outputs, and the gradients of two random vectors with the first input."""
        outputs = tensors(self.model(*arguments, **named))
        vectors = torch.randn(2, *outputs[0].shape, generator=torch.Generator().manual_seed(3))
        (gradients,) = torch.autograd.grad(
            outputs[0], arguments[0], vectors.to(outputs[0]), is_grads_batched=True, retain_graph=True
        )
        return [*outputs, gradients]


@wrapper("batched gradients", FIRST)
def _batched(each: Subject) -> nn.Module:
    return Batched(each.model)


class Penalty(nn.Module):
    """A model whose output is joined by a gradient that gradients are taken of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Tensor, **named: Any) -> list[Tensor]:
        """Outputs, and the gradient of their sum with the first input."""
        with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative on a CPU
            outputs = tensors(self.model(*arguments, **named))
        (gradient,) = torch.autograd.grad(outputs[0].square().sum(), arguments[0], create_graph=True)
        return [*outputs, gradient]


@wrapper("second derivatives", FIRST)
def _penalty(each: Subject) -> nn.Module:
    return Penalty(each.model)


@wrapper("forward-mode derivatives", FIRST)
def _forward_mode(each: Subject) -> nn.Module:
    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = each.model

        def forward(self, x: Tensor, *more: Any, **named: Any) -> list[Tensor]:
            def call(x: Tensor) -> Tensor:
                with sdpa_kernel(SDPBackend.MATH):
                    return tensors(self.model(x, *more, **named))[0]

            return list(torch.func.jvp(call, (x,), (torch.ones_like(x),)))

    return Forward()


@wrapper("autocast to bf16", FIRST)
def _autocast(each: Subject) -> nn.Module:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = each.model

        def forward(self, *arguments: Any, **named: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(*arguments, **named)

    return Autocast()
