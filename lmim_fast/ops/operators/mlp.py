"""The MLP with GELU in the epilogues of its products, for tracers; `ops/sublayers.py` runs it otherwise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmim_fast import kernels
from lmim_fast.ops.operators.operator import operator
from lmim_fast.ops.products import matmul, weight_gradient, without_autocast


def _fake(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    hidden = x.new_empty(len(x), len(weight1)) if keep_hidden else x.new_empty(0)
    return x.new_empty(len(x), len(weight2)), hidden


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4], output[1])


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:4]
    x, weight1, bias1, weight2, hidden = ctx.saved_tensors
    with without_autocast(grad.device):
        grad_hidden, grad_bias1, grad_weight2 = mlp_backward(
            grad.contiguous(), bias1, weight2, hidden, needed[2], needed[3]
        )
        grad_weight1 = grad_hidden.T @ x if needed[1] else None
        grad_x = grad_hidden @ weight1 if needed[0] else None
    return (
        grad_x,
        grad_weight1,
        grad_bias1 if needed[2] else None,
        grad_weight2 if needed[3] else None,
        None,
    )


@operator(_fake, _setup, _differentiate)
def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    """Product (M, D2), and x @ weight1.T + bias1 (M, F) where it is kept for the backward pass, else (0,)."""
    hidden, activated = kernels.linear_gelu.forward(x, weight1, bias1, keep_hidden=keep_hidden)
    return matmul(activated, weight2), x.new_empty(0) if hidden is None else hidden


def _fake_backward(grad, bias1, weight2, hidden, bias_wanted, weight_wanted):  # type: ignore[no-untyped-def]
    return (
        hidden.new_empty(hidden.shape),
        bias1.new_empty(bias1.shape if bias_wanted else 0),
        grad.new_empty(weight2.shape if weight_wanted else 0),
    )


@operator(_fake_backward)
def mlp_backward(
    grad: Tensor, bias1: Tensor, weight2: Tensor, hidden: Tensor, bias_wanted: bool, weight_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the hidden rows (M, F), and of bias1 and weight2; one that is not wanted is empty."""
    grad_hidden, activated, sums = kernels.linear_gelu.backward(
        grad, weight2, hidden, activated_wanted=weight_wanted, bias_wanted=bias_wanted
    )
    with without_autocast(grad.device):
        grad_weight2 = (
            grad.new_empty(0) if activated is None else weight_gradient(grad, activated, grad.dtype)
        )
    return grad_hidden, bias1.new_empty(0) if sums is None else sums.to(bias1.dtype), grad_weight2
