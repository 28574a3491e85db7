"""The nine linears of ViT-S and its decoder: the product, and those of its backward pass.

dgrad is the gradient of the input, wgrad that of the weight. They are PyTorch's, with no kernel of ours: what
they reach of their floor is what the step can reach. Both student branches are one product, of B x (52 + 257)
rows in the encoder. "fp32 out" writes wgrad in fp32, which saves the cast to the parameter's type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.harness import DEVICE, Operation, Result, Unavailable, measure, seconds_a_call
from benchmarks.shapes import DECODER, SMALL, TOKENS, Model

VARIANTS = ("eager", "fp32 out")
DIRECTIONS = ("forward",)  # each product by itself
PASSES = ("forward", "dgrad", "wgrad")
pytestmark = pytest.mark.benchmark(timer=seconds_a_call)


def test_linear(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    measure(benchmark, operation, direction, variant)


def operations(batch: int) -> Iterator[Operation]:
    for model, tokens in ((SMALL, sum(TOKENS)), (DECODER, DECODER.tokens[0])):
        for inputs, outputs in shapes(model):
            for name in PASSES:
                yield _operation(model.name, batch, tokens, inputs, outputs, name)


def shapes(model: Model) -> list[tuple[int, int]]:
    """Widths of input and output: qkv, projection, (keys and values of the decoder,) and both of the MLP."""
    width, hidden = model.width, model.hidden
    memory = [(width, 2 * width)] if model is DECODER else []
    return [(width, 3 * width), (width, width), *memory, (width, hidden), (hidden, width)]


def _operation(model: str, batch: int, tokens: int, inputs: int, outputs: int, name: str) -> Operation:
    rows = batch * tokens
    of_input, of_output, of_weight = (rows, inputs), (rows, outputs), (outputs, inputs)
    shapes = {
        "forward": (of_input, of_weight),
        "dgrad": (of_output, of_weight),
        "wgrad": (of_output, of_input),
    }[name]

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape, device=device, dtype=dtype) for shape in shapes)

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.Passes(floors.linear(rows, inputs, outputs, itemsize).forward, ())

    sizes = dict(model=model, batch=batch, tokens=tokens, inputs=inputs, outputs=outputs, p=0.0)
    others: dict[str, Callable[..., Result]] = {"fp32 out": _wgrad_in_fp32} if name == "wgrad" else {}
    return Operation(
        f"linear_{name}", sizes, make, _PRODUCTS[name], {}, passes, others, directions=DIRECTIONS
    )


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def _dgrad(grad: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(grad, weight)


def _wgrad(grad: Tensor, x: Tensor) -> Tensor:
    return torch.mm(grad.t(), x)


def _wgrad_in_fp32(grad: Tensor, x: Tensor) -> Tensor:
    if DEVICE.type != "cuda":
        raise Unavailable("products of 16 bits have an fp32 result on a CUDA device alone")
    return torch.mm(grad.t(), x, out_dtype=torch.float32)


_PRODUCTS: dict[str, Callable[..., Result]] = {"forward": _forward, "dgrad": _dgrad, "wgrad": _wgrad}
