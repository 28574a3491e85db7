"""Dropout, residual add and LayerNorm in one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops import dispatch, dropout
from lmim_fast.ops.operators import norm as operators
from lmim_fast.ops.transforms import transformed

MAX_WIDTH = 2048  # wider rows do not fit the registers of a program


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
    dropout.check(p, seed)
    dispatch.same_device(residual=residual, seed=seed)
    if takes(residual, x, x_bias, weight, bias, x.dtype):
        seed = dropout.settled_seed(p, seed, x.device)
        rows, total, _ = operators.dropout_add_layer_norm(
            x, x_bias, residual, weight, bias, seed, p, x.dtype, eps
        )
        return rows, total
    return _eager(x, x_bias, residual, weight, bias, p, seed, eps)


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
    if takes(x, None, None, weight, bias, dtype):
        rows: Tensor = operators.dropout_add_layer_norm(None, None, x, weight, bias, None, 0.0, dtype, eps)[0]
        return rows
    return _layer_norm_eager(x, weight, bias, dtype, eps)


def takes(
    residual: Tensor,
    x: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
) -> bool:
    """True if the kernel runs on these inputs, with rows in `dtype`; `layer_norm` has no x.

    Raises:
        ValueError, RuntimeError: as the ops.
    """
    width = residual.shape[-1:]
    fits = weight.shape == bias.shape == width and dtype.is_floating_point and residual.is_floating_point()
    fits = fits and weight.is_floating_point() and bias.is_floating_point()
    if x is not None:
        fits = fits and x.shape == residual.shape and (x_bias is None or x_bias.shape == width)
    tensors = residual, x, x_bias, weight, bias
    if not fits or not residual.dim():
        _refuse(*tensors, dtype)
    dispatch.same_device(residual=residual, x=x, x_bias=x_bias, weight=weight, bias=bias)
    reason = None
    if not 1 <= width[0] <= MAX_WIDTH:
        reason = f"takes rows of 1 to {MAX_WIDTH} values, got {width[0]}"
    return dispatch.takes("layer_norm" if x is None else "dropout_add_layer_norm", tensors, reason, dtype)


def _refuse(
    residual: Tensor,
    x: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
) -> None:
    """Raise the ValueError of inputs that do not fit each other."""
    if x is not None and x.shape != residual.shape:
        raise ValueError(f"x {tuple(x.shape)} and residual {tuple(residual.shape)} must have one shape")
    if residual.dim() == 0:
        raise ValueError("x must have at least one dimension, got a single number")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, got {dtype}")
    for name, tensor in (("x", residual if x is None else x), ("residual", residual)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    given = {"x_bias": x_bias, "weight": weight, "bias": bias}
    for name, parameter in given.items():
        if parameter is not None and not parameter.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {parameter.dtype}")
        if parameter is not None and parameter.shape != residual.shape[-1:]:
            wanted = f"({residual.shape[-1]},) for x {tuple(residual.shape)}"
            raise ValueError(f"{name} {tuple(parameter.shape)} must be {wanted}")


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
    if branch is not x and p == 0 and x.dtype == residual.dtype and not transformed():
        total = branch.add_(residual)
    else:
        total = residual + dropout.dropout(branch, p, seed).to(residual.dtype)
    return _layer_norm_eager(total, weight, bias, x.dtype, eps), total


def _layer_norm_eager(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    if x.dtype == weight.dtype == bias.dtype == dtype and dtype in (torch.float32, torch.float64):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    full = x if x.dtype == torch.float64 else x.float()
    return F.layer_norm(full, x.shape[-1:], weight.to(full.dtype), bias.to(full.dtype), eps).to(dtype)
