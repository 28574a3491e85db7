"""Dropout, residual add and LayerNorm in one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops import dispatch, dropout

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH = 2048  # wider rows do not fit the registers of a program


def dropout_add_layer_norm(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add `dropout(x + x_bias)` to `residual` and normalise the sum, as it is rounded to residual's dtype.

    Args:
        x:        (..., D) branch product without its bias, fp32 | bf16 | fp16.
        x_bias:   (D,) bias of the linear that made x, or None; its gradient comes out of this op.
        residual: (..., D) residual stream, same shape; its dtype is kept.
        weight:   (D,) scale.
        bias:     (D,) shift.
        p:        dropout probability.
        seed:     one int64 that fixes the mask; without it torch's generator does.
        eps:      added to the variance.
    Returns:
        normalised (..., D) in x's dtype, new residual (..., D).
    Raises:
        ValueError: shapes differ, an input is not floating-point, inputs are on several devices, p is
            outside [0, 1), or seed is not one int64.
    Source: post-norm of Vaswani et al. 2017; fusion as in FlashAttention's dropout_add_ln.
    """
    if x.shape != residual.shape:
        raise ValueError(f"x {tuple(x.shape)} and residual {tuple(residual.shape)} must have one shape")
    _check(x=x, residual=residual, x_bias=x_bias, weight=weight, bias=bias)
    dropout.check_probability(p)
    dropout.check_seed(seed)
    dispatch.same_device(x=x, x_bias=x_bias, residual=residual, weight=weight, bias=bias, seed=seed)
    return dispatch.run("dropout_add_layer_norm", _eager, x, x_bias, residual, weight, bias, p, seed, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension with fp32 statistics.

    Args:
        x:      (..., D), any float dtype.
        weight: (D,) scale.
        bias:   (D,) shift.
        dtype:  of the result.
        eps:    added to the variance.
    Returns:
        (..., D) in `dtype`.
    Raises:
        ValueError: weight or bias is not (D,), an input or `dtype` is not floating-point, or inputs are on
            several devices.
    Source: Ba et al. 2016.
    """
    _check(x=x, weight=weight, bias=bias)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, got {dtype}")
    dispatch.same_device(x=x, weight=weight, bias=bias)
    return dispatch.run("layer_norm", _layer_norm_eager, x, weight, bias, dtype, eps)


def _check(x: Tensor, residual: Tensor | None = None, **parameters: Tensor | None) -> None:
    """Raise ValueError unless all are floating-point and the parameters are as wide as x."""
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a single number")
    for name, tensor in {"x": x, "residual": residual, **parameters}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} {tuple(parameter.shape)} must be ({x.shape[-1]},) for x {tuple(x.shape)}"
            )


def _eager(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    seed: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    branch = x if x_bias is None else x + x_bias.to(x.dtype)
    if branch is not x and p == 0 and x.dtype == residual.dtype:
        total = branch.add_(residual)
    else:
        total = residual + dropout.dropout(branch, p, seed).to(residual.dtype)
    return _layer_norm_eager(total, weight, bias, x.dtype, eps), total


def _layer_norm_eager(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    full = x if x.dtype == torch.float64 else x.float()
    return F.layer_norm(full, x.shape[-1:], weight.to(full.dtype), bias.to(full.dtype), eps).to(dtype)


def _rows(x: Tensor) -> int | torch.SymInt:
    return x[..., 0].numel()


@torch.library.custom_op("lmim_fast::dropout_add_layer_norm", mutates_args=())
def _forward(
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
    from lmim_fast.kernels import norm

    normalised, total, statistics = norm.forward(
        x, x_bias, residual, weight, bias, seed, dropout.threshold(p), dtype, eps
    )
    return normalised, residual.new_empty(0) if total is None else total, statistics


@_forward.register_fake
def _(x, x_bias, residual, weight, bias, seed, p, dtype, eps):  # type: ignore[no-untyped-def]
    normalised = residual.new_empty(residual.shape, dtype=dtype)
    total = residual.new_empty(0 if x is None else residual.shape)
    return normalised, total, residual.new_empty((2, _rows(residual)), dtype=torch.float32)


@torch.library.custom_op("lmim_fast::dropout_add_layer_norm_backward", mutates_args=())
def _backward(
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
    from lmim_fast.kernels import norm

    grad_x, grad_residual, sums = norm.backward(
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


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, grad_total, total, weight, statistics, seed, p, x_dtype, residual_dtype, parameters, x_bias
):
    def like(dtype: torch.dtype | None) -> Tensor:
        return total.new_empty(0) if dtype is None else total.new_empty(total.shape, dtype=dtype)

    sums = statistics.new_empty((2 * parameters + x_bias, total.shape[-1]))
    return like(x_dtype), like(residual_dtype), sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, x_bias, residual, weight, bias, seed, p, _, _ = inputs
    _, total, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((total, statistics) if x is None else (statistics,)))
    ctx.save_for_backward(residual if x is None else total, weight, statistics, seed)
    ctx.p = p
    ctx.x_dtype = None if x is None else x.dtype
    ctx.x_bias_dtype = None if x_bias is None else x_bias.dtype
    ctx.bias_dtype = bias.dtype


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, weight, statistics, seed = ctx.saved_tensors
    if grad is None and grad_total is None:
        return (None,) * 9
    x_wanted, x_bias_wanted, residual_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:5]
    parameters = grad is not None and (weight_wanted or bias_wanted)
    shared = x_wanted and ctx.p == 0 and ctx.x_dtype == total.dtype  # one tensor is both gradients
    grad_x, grad_residual, sums = _backward(
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


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _launch(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    seed: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if p == 0:
        seed = None
    elif seed is None:
        seed = dropout.draw_seed(x.device)
    normalised, total, _ = _forward(x, x_bias, residual, weight, bias, seed, p, x.dtype, eps)
    return normalised, total


def _launch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    return _forward(None, None, x, weight, bias, None, 0.0, dtype, eps)[0]


def _refuses_width(x: Tensor) -> str | None:
    width = x.shape[-1]
    return None if 1 <= width <= _MAX_WIDTH else f"takes rows of 1 to {_MAX_WIDTH} values, got {width}"


def _refuses_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, eps: float
) -> str | None:
    return _refuses_width(x) if dtype in _DTYPES else f"has no kernel for results in {dtype}"


dispatch.register(
    "dropout_add_layer_norm",
    dispatch.Kernel(launch=_launch, dtypes=_DTYPES, refuses=lambda x, *_: _refuses_width(x)),
)
dispatch.register(
    "layer_norm",
    dispatch.Kernel(launch=_launch_layer_norm, dtypes=_DTYPES, refuses=_refuses_layer_norm),
)
