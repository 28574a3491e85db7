"""Masked feature loss, in a step whose loss it is: the gradient that reaches it is 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import floors
from benchmarks.harness import Operation, measure, seconds_a_call
from benchmarks.shapes import BASE, MASKED, SMALL, TOKENS
from lmim_fast.ops.feature_loss import masked_feature_loss
from lmim_fast.ops.masking import select_patches

VARIANTS = ("ours", "eager", "compiled")
pytestmark = pytest.mark.benchmark(timer=seconds_a_call)


def test_feature_loss(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    measure(benchmark, operation, direction, variant)


def operations(batch: int) -> Iterator[Operation]:
    for model in (SMALL, BASE):
        yield _operation(model.name, batch, model.width)


class _Whole(torch.autograd.Function):
    """The loss of a step: its gradient is 1, whatever is handed in. 1-D, as all sums over rows are judged."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.view(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.ones_like(gradient).view(())


def _operation(model: str, batch: int, width: int) -> Operation:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        product = torch.randn(batch, MASKED, width, device=device, dtype=dtype)
        bias = torch.randn(width, device=device)
        features = 2 * torch.randn(batch, TOKENS[-1], width, device=device, dtype=dtype) + 1
        _, ids = select_patches(torch.rand(batch, TOKENS[-1] - 1, device=device), TOKENS[0] - 1)
        return product.requires_grad_(), bias.requires_grad_(), features, ids

    def ours(
        product: Tensor, bias: Tensor, features: Tensor, ids: Tensor, seed: Tensor | None = None
    ) -> Tensor:
        loss: Tensor = _Whole.apply(masked_feature_loss(product, bias, features, ids))
        return loss

    def plain(product: Tensor, bias: Tensor, features: Tensor, ids: Tensor) -> Tensor:
        rows = (1 + ids.long())[:, :, None].expand(-1, -1, width)
        target = F.layer_norm(features.gather(1, rows).to(bias.dtype), (width,))
        prediction = (product + bias.to(product.dtype)).to(bias.dtype)
        loss: Tensor = _Whole.apply(F.mse_loss(prediction, target))
        return loss

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.masked_feature_loss(batch * MASKED, width, itemsize, training)

    sizes = dict(model=model, batch=batch, tokens=MASKED, width=width, p=0.0)
    leading = model == SMALL.name
    return Operation("masked_feature_loss", sizes, inputs, plain, {"ours": ours}, passes, leading=leading)
