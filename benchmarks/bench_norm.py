"""Dropout, residual add and LayerNorm; LayerNorm alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import floors
from benchmarks.harness import DTYPE, Operation, measure, seconds_a_call
from benchmarks.shapes import MODELS, SMALL
from lmim_fast.ops.norm import dropout_add_layer_norm, layer_norm

VARIANTS = ("ours", "eager", "compiled")
pytestmark = pytest.mark.benchmark(timer=seconds_a_call)


def test_norm(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    measure(benchmark, operation, direction, variant)


def operations(batch: int) -> Iterator[Operation]:
    for model in MODELS:
        for tokens in model.tokens:
            for p in model.dropouts:
                yield _add(model.name, batch, tokens, model.width, p, DTYPE)
    yield _alone(SMALL.name, batch, SMALL.tokens[-1], SMALL.width)
    if DTYPE.itemsize < 4:
        yield _add(SMALL.name, batch, SMALL.tokens[-1], SMALL.width, 0.0, torch.float32)


def _add(model: str, batch: int, tokens: int, width: int, p: float, residual: torch.dtype) -> Operation:
    rows = batch * tokens

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = torch.randn(rows, width, device=device, dtype=dtype)
        stream = torch.randn(rows, width, device=device, dtype=residual)
        return tuple(tensor.requires_grad_() for tensor in (x, stream, *_parameters(3, width, device)))

    def ours(
        x: Tensor,
        stream: Tensor,
        weight: Tensor,
        bias: Tensor,
        x_bias: Tensor,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        return dropout_add_layer_norm(x, x_bias, stream, weight, bias, p=p, seed=seed, eps=1e-6)

    def plain(x: Tensor, stream: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> tuple[Tensor, ...]:
        stream = stream + F.dropout(x + x_bias.to(x.dtype), p).to(stream.dtype)
        return F.layer_norm(stream.to(weight.dtype), (width,), weight, bias, 1e-6).to(x.dtype), stream

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.dropout_add_layer_norm(rows, width, itemsize, residual.itemsize, dropout=p > 0)

    sizes = dict(model=model, batch=batch, tokens=tokens, width=width, p=p)
    if residual != DTYPE:
        sizes["residual"] = str(residual).removeprefix("torch.")
    leading = (model, tokens, residual) == (SMALL.name, 257, DTYPE)
    return Operation("dropout_add_layer_norm", sizes, inputs, plain, {"ours": ours}, passes, leading=leading)


def _alone(model: str, batch: int, tokens: int, width: int) -> Operation:
    rows = batch * tokens

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = torch.randn(rows, width, device=device, dtype=dtype)
        return tuple(tensor.requires_grad_() for tensor in (x, *_parameters(2, width, device)))

    def ours(x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
        return layer_norm(x, weight, bias, x.dtype, eps=1e-6)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x.to(weight.dtype), (width,), weight, bias, 1e-6).to(x.dtype)

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.layer_norm(rows, width, itemsize, itemsize)

    sizes = dict(model=model, batch=batch, tokens=tokens, width=width, p=0.0)
    return Operation("layer_norm", sizes, inputs, plain, {"ours": ours}, passes)


def _parameters(count: int, width: int, device: torch.device) -> list[Tensor]:
    """fp32, as under autocast; the first is a scale near 1."""
    parameters = [torch.randn(width, device=device) for _ in range(count)]
    parameters[0] = 1 + parameters[0] / 10
    return parameters
