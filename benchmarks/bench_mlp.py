"""The two products of an MLP with bias and GELU between them.

"ours" has GELU in a separate pass, "epilogue" in the products' epilogues. `auto` takes the second where
`benchmarks/epilogue_table.py` found it to be faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import floors
from benchmarks.harness import DEVICE, Operation, Unavailable, measure, seconds_a_call
from benchmarks.shapes import MODELS, SMALL, Model
from lmim_fast.ops import dispatch
from lmim_fast.ops.mlp import mlp

VARIANTS = ("ours", "epilogue", "eager", "compiled")
pytestmark = pytest.mark.benchmark(timer=seconds_a_call)


def test_mlp(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    measure(benchmark, operation, direction, variant)


def operations(batch: int) -> Iterator[Operation]:
    for model in MODELS:
        for tokens in model.tokens:
            yield _operation(model, batch, tokens)


def _operation(model: Model, batch: int, tokens: int) -> Operation:
    rows, width, hidden = batch * tokens, model.width, model.hidden

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = torch.randn(rows, width, device=device, dtype=dtype)
        first = torch.randn(hidden, width, device=device, dtype=dtype) / width**0.5
        second = torch.randn(width, hidden, device=device, dtype=dtype) / hidden**0.5
        bias = torch.randn(hidden, device=device)
        return tuple(tensor.requires_grad_() for tensor in (x, first, bias, second))

    def ours(x: Tensor, first: Tensor, bias: Tensor, second: Tensor, seed: Tensor | None = None) -> Tensor:
        return mlp(x, first, bias, second, epilogue="off")

    def epilogue(
        x: Tensor, first: Tensor, bias: Tensor, second: Tensor, seed: Tensor | None = None
    ) -> Tensor:
        if DEVICE.type != "cuda" and dispatch.current_backend() != "triton":
            raise Unavailable("kernels need a CUDA device")
        return mlp(x, first, bias, second, epilogue="on")

    def plain(x: Tensor, first: Tensor, bias: Tensor, second: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, first, bias.to(x.dtype))), second)

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.mlp(rows, width, hidden, itemsize, training)

    sizes = dict(model=model.name, batch=batch, tokens=tokens, width=width, hidden=hidden, p=0.0)
    forms = {"ours": ours, "epilogue": epilogue}
    return Operation("mlp", sizes, inputs, plain, forms, passes, leading=(model, tokens) == (SMALL, 257))
