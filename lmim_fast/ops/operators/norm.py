"""Dropout, residual add and LayerNorm by their kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmim_fast import kernels
from lmim_fast.ops import dropout
from lmim_fast.ops.operators.operator import operator


def _fake(x, x_bias, residual, weight, bias, seed, p, dtype, eps):  # type: ignore[no-untyped-def]
    normalised = residual.new_empty(residual.shape, dtype=dtype)
    total = residual.new_empty(0 if x is None else residual.shape)
    return normalised, total, residual.new_empty((2, residual[..., 0].numel()), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, x_bias, residual, weight, bias, seed, ctx.p, _, _ = inputs
    _, total, statistics = output
    ctx.mark_non_differentiable(*((total, statistics) if x is None else (statistics,)))
    ctx.save_for_backward(residual if x is None else total, weight, statistics, seed)
    ctx.x_dtype = None if x is None else x.dtype
    ctx.x_bias_dtype = None if x_bias is None else x_bias.dtype
    ctx.bias_dtype = bias.dtype


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, weight, statistics, seed = ctx.saved_tensors
    x_wanted, x_bias_wanted, residual_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:5]
    parameters = grad is not None and (weight_wanted or bias_wanted)
    shared = x_wanted and ctx.p == 0 and ctx.x_dtype == total.dtype  # one tensor is both gradients
    grad_x, grad_residual, sums = dropout_add_layer_norm_backward(
        grad,
        grad_total,
        total,
        weight,
        statistics,
        seed,
        ctx.p,
        ctx.x_dtype if x_wanted and not shared else None,
        total.dtype if residual_wanted or shared else None,
        parameters,
        x_bias_wanted,
    )
    return (
        (grad_residual if shared else grad_x) if x_wanted else None,
        sums[-1].to(ctx.x_bias_dtype) if x_bias_wanted else None,
        grad_residual if residual_wanted else None,
        sums[0].to(weight.dtype) if parameters and weight_wanted else None,
        sums[1].to(ctx.bias_dtype) if parameters and bias_wanted else None,
        *(None,) * 4,
    )


@operator(_fake, _setup, _differentiate)
def dropout_add_layer_norm(
    x: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    p: float,
    dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows, their sum (empty where x is None), statistics (2, rows)."""
    normalised, total, statistics = kernels.norm.forward(
        x, x_bias, residual, weight, bias, seed, dropout.threshold(p), dtype, eps
    )
    return normalised, residual.new_empty(0) if total is None else total, statistics


def _fake_backward(  # type: ignore[no-untyped-def]
    grad, grad_total, total, weight, statistics, seed, p, x_dtype, residual_dtype, parameters, x_bias
):
    def like(dtype: torch.dtype | None) -> Tensor:
        return total.new_empty(0) if dtype is None else total.new_empty(total.shape, dtype=dtype)

    sums = statistics.new_empty((2 * parameters + x_bias, total.shape[-1]))
    return like(x_dtype), like(residual_dtype), sums


@operator(_fake_backward)
def dropout_add_layer_norm_backward(
    grad: Tensor | None,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    statistics: Tensor,
    seed: Tensor | None,
    p: float,
    x_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    parameters: bool,
    x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and residual, empty where no dtype is given; (k, D) sums of the parameters wanted."""
    grad_x, grad_residual, sums = kernels.norm.backward(
        grad,
        grad_total,
        total,
        weight,
        statistics,
        seed,
        dropout.threshold(p),
        x_dtype=x_dtype,
        residual_dtype=residual_dtype,
        parameters=parameters,
        x_bias=x_bias,
    )
    none = total.new_empty
    return none(0) if grad_x is None else grad_x, none(0) if grad_residual is None else grad_residual, sums
