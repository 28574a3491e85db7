"""Dropout, residual add and LayerNorm in one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops.dispatch import run


def dropout_add_layer_norm(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    p: float = 0.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add `dropout(x + x_bias)` to `residual` and normalise the sum.

    Args:
        x:        (..., D) branch product without its bias, fp32 | bf16 | fp16.
        x_bias:   (D,) bias of the linear that made x, or None.
        residual: (..., D) residual stream, same shape; its dtype is kept.
        weight:   (D,) scale.
        bias:     (D,) shift.
        p:        dropout probability, from torch's generator.
        eps:      added to the variance.
    Returns:
        normalised (..., D) in x's dtype, new residual (..., D).
    Raises:
        ValueError: shapes differ, or p outside [0, 1).
    Source: post-norm of Vaswani et al. 2017; fusion as in FlashAttention's dropout_add_ln.
    """
    if x.shape != residual.shape:
        raise ValueError(f"x {tuple(x.shape)} and residual {tuple(residual.shape)} must have one shape")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")
    return run("dropout_add_layer_norm", _eager, x, x_bias, residual, weight, bias, p, eps)


def _eager(
    x: Tensor, x_bias: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, p: float, eps: float
) -> tuple[Tensor, Tensor]:
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    total = residual + F.dropout(x, p).to(residual.dtype)
    return layer_norm(total, weight, bias, x.dtype, eps=eps), total


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
        ValueError: weight or bias is not (D,).
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be "
            f"({x.shape[-1]},) for x {tuple(x.shape)}"
        )
    full = x if x.dtype == torch.float64 else x.float()
    return F.layer_norm(full, x.shape[-1:], weight.to(full.dtype), bias.to(full.dtype), eps).to(dtype)
