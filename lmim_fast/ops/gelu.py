"""Bias, exact GELU and dropout in one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops import dispatch, dropout
from lmim_fast.ops.operators import gelu as operators
from lmim_fast.ops.transforms import by_autograd, ordinary, transformed


def bias_gelu(x: Tensor, bias: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """dropout(gelu(x + bias)) with the exact (erf) GELU. Keeps only x for the backward pass.

    Args:
        x:    (..., F) product without its bias, fp32 | bf16 | fp16.
        bias: (F,); its gradient comes out of this op.
        p:    dropout probability.
        seed: one int64 that fixes the mask; without it torch's generator does.
    Returns:
        (..., F) in x's dtype.
    Raises:
        ValueError: bias is not (F,), an input is not floating-point, inputs are on several devices, p is
            outside [0, 1), or seed is not one int64.
    Source: Hendrycks and Gimpel 2016.
    """
    check(x, bias)
    dropout.check(p, seed)
    dispatch.same_device(x=x, seed=seed)
    if takes(bias, x.dtype):
        activated: Tensor = operators.bias_gelu(x, bias, dropout.settled_seed(p, seed, x.device), p)
        return activated
    return _eager(x, bias, p, seed)


def takes(bias: Tensor, dtype: torch.dtype) -> bool:
    """True if the kernel runs on hidden rows (..., F) of a dtype, with this bias (F,)."""
    reason = None if bias.numel() else "takes rows of at least 1 value, got 0"
    return dispatch.takes("bias_gelu", (bias,), reason, dtype)


def check(x: Tensor, bias: Tensor) -> None:
    """Raise ValueError where bias is not as wide as x, one is not floating-point, or their devices differ."""
    if x.dim() == 0 or bias.shape != x.shape[-1:]:
        raise ValueError(f"bias {tuple(bias.shape)} must be as wide as x {tuple(x.shape)}")
    if not (x.is_floating_point() and bias.is_floating_point()):
        name, tensor = ("bias", bias) if x.is_floating_point() else ("x", x)
        raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    dispatch.same_device(x=x, bias=bias)


def _eager(x: Tensor, bias: Tensor, p: float, seed: Tensor | None) -> Tensor:
    bias = bias.to(x.dtype)
    # A compiler plans memory itself, and that of PyTorch 2.11 would lose the gradient of a result in place.
    plain = torch.compiler.is_compiling() or transformed()
    activated = _plain(x, bias) if plain else _BiasGelu.apply(x, bias)
    return dropout.dropout(activated, p, seed)


def _plain(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


class _BiasGelu(torch.autograd.Function):
    """Keeps only x: the sum with the bias is made again for backward. Results take the sum's memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        result: Tensor = torch.ops.aten.gelu_(x + bias)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, bias = ctx.saved_tensors
        if not ordinary(grad):
            of_x, of_bias = by_autograd(_plain, (x, bias), ctx.needs_input_grad, (grad,))
            return of_x, of_bias
        total = x + bias
        grad_x = torch.ops.aten.gelu_backward.grad_input(grad, total, grad_input=total)
        return grad_x, grad_x.reshape(-1, bias.shape[0]).sum(0)
