"""Bias, GELU and dropout by their kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmim_fast import kernels
from lmim_fast.ops import dropout
from lmim_fast.ops.operators.operator import operator


def _fake(x, bias, seed, p):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, seed, ctx.p = inputs
    ctx.save_for_backward(x, bias, seed)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_wanted, bias_wanted = ctx.needs_input_grad[:2]
    x, bias, seed = ctx.saved_tensors
    grad_x, grad_bias = bias_gelu_backward(grad, x, bias, seed, ctx.p, bias_wanted)
    return grad_x if x_wanted else None, grad_bias if bias_wanted else None, None, None


@operator(_fake, _setup, _differentiate)
def bias_gelu(x: Tensor, bias: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """dropout(gelu(x + bias))."""
    activated: Tensor = kernels.gelu.forward(x, bias, seed, dropout.threshold(p))
    return activated


def _fake_backward(grad, x, bias, seed, p, bias_wanted):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), bias.new_empty(bias.shape if bias_wanted else 0)


@operator(_fake_backward)
def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor, seed: Tensor | None, p: float, bias_wanted: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the bias, which is empty where it is not wanted."""
    grad_x, sums = kernels.gelu.backward(grad, x, bias, seed, dropout.threshold(p), bias_wanted=bias_wanted)
    return grad_x, bias.new_empty(0) if sums is None else sums.to(bias.dtype)
