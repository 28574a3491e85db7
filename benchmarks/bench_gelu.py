"""Bias, exact GELU and dropout over the hidden rows of an MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import floors
from benchmarks.harness import Operation, measure, seconds_a_call
from benchmarks.shapes import MODELS, SMALL
from lmim_fast.ops.gelu import bias_gelu

VARIANTS = ("ours", "eager", "compiled")
pytestmark = pytest.mark.benchmark(timer=seconds_a_call)


def test_gelu(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    measure(benchmark, operation, direction, variant)


def operations(batch: int) -> Iterator[Operation]:
    for model in MODELS:
        for tokens in model.tokens:
            for p in model.dropouts:
                yield _operation(model.name, batch, tokens, model.hidden, p)


def _operation(model: str, batch: int, tokens: int, hidden: int, p: float) -> Operation:
    rows = batch * tokens

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = torch.randn(rows, hidden, device=device, dtype=dtype)
        return x.requires_grad_(), torch.randn(hidden, device=device).requires_grad_()

    def ours(x: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
        return bias_gelu(x, bias, p=p, seed=seed)

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return F.dropout(F.gelu(x + bias.to(x.dtype)), p)

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.bias_gelu(rows, hidden, itemsize)

    sizes = dict(model=model, batch=batch, tokens=tokens, width=hidden, p=p)
    leading = (model, tokens) == (SMALL.name, 257)
    return Operation("bias_gelu", sizes, inputs, plain, {"ours": ours}, passes, leading=leading)
