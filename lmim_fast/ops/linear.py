"""Bias-free linear whose input can be recomputed in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype products run in: autocast's where it is on, else that of the weights."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in x's dtype; the bias is the business of the op that reads the product.

    Args:
        x:      (..., D).
        weight: (F, D), cast to x's dtype.
    Returns:
        (..., F).
    """
    return _product(x, weight.to(x.dtype))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in their own dtype, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight)


def linear_recomputing(
    x: Tensor, weight: Tensor, recompute: Callable[..., Tensor], *sources: Tensor | None
) -> Tensor:
    """As `linear`, but keeps `sources` for the backward pass, which rebuilds x as recompute(*sources).

    Saves the memory of x when its sources are kept by other ops anyway. Under torch.compile it is `linear`:
    the compiler decides itself what to recompute.

    Args:
        x:         (..., D), equal to recompute(*sources).
        weight:    (F, D), cast to x's dtype.
        recompute: a function of tensors without state or randomness.
    Returns:
        (..., F).
    """
    weight = weight.to(x.dtype)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _product(x, weight)
    product: Tensor = _RecomputingLinear.apply(x, weight, recompute, *sources)
    return product


class _RecomputingLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, recompute: Callable[..., Tensor], *sources: Any
    ) -> Tensor:
        ctx.recompute = recompute
        ctx.save_for_backward(weight, *sources)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            x = ctx.recompute(*sources)
            grad_weight = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return grad_x, grad_weight, None, *(None for _ in sources)
