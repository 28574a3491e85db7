"""Bias, exact GELU and dropout in one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops.dispatch import run


def bias_gelu(x: Tensor, bias: Tensor, *, p: float = 0.0) -> Tensor:
    """dropout(gelu(x + bias)) with the exact (erf) GELU.

    Args:
        x:    (..., F) product without its bias.
        bias: (F,), cast to x's dtype.
        p:    dropout probability, from torch's generator.
    Returns:
        (..., F) in x's dtype.
    Raises:
        ValueError: bias is not (F,), or p outside [0, 1).
    Source: Hendrycks and Gimpel 2016.
    """
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias {tuple(bias.shape)} must be ({x.shape[-1]},) for x {tuple(x.shape)}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")
    return run("bias_gelu", _eager, x, bias, p)


def _eager(x: Tensor, bias: Tensor, p: float) -> Tensor:
    activated: Tensor = _BiasGelu.apply(x, bias.to(x.dtype))
    return F.dropout(activated, p)


class _BiasGelu(torch.autograd.Function):
    """Keeps only x: the sum with the bias is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return F.gelu(x + bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        grad_x = torch.ops.aten.gelu_backward(grad, x + bias)
        return grad_x, grad_x.flatten(0, -2).sum(0)
