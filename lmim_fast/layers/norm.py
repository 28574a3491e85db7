"""Residual add and LayerNorm: as a module, and in front of a linear or an MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmim_fast.ops import dispatch
from lmim_fast.ops.dropout import check_probability
from lmim_fast.ops.epilogue import in_epilogue
from lmim_fast.ops.linear import compute_dtype, linear, linear_recomputing
from lmim_fast.ops.mlp import gelu_linear, launch_mlp
from lmim_fast.ops.norm import dropout_add_layer_norm, layer_norm

LAYER_NORM_EPS = 1e-6


class DropoutAddLayerNorm(nn.Module):
    """Dropout of a branch, residual add and LayerNorm in one pass; weight and bias as in nn.LayerNorm.

    Args:
        width: D.
        p:     dropout probability of the branch, in training mode.
        eps:   added to the variance.
    Raises:
        ValueError: p is outside [0, 1).
    """

    def __init__(self, width: int, p: float = 0.0, eps: float = LAYER_NORM_EPS) -> None:
        super().__init__()
        check_probability(p)
        self.p, self.eps = p, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, residual: Tensor, x_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Norm of `residual + dropout(x + x_bias)`, and that sum.

        Args:
            x:        (..., D) branch, fp32 | bf16 | fp16.
            residual: (..., D) residual stream.
            x_bias:   (D,) bias of the linear in front, if it did not add it itself.
        Returns:
            normalised (..., D) in x's dtype, new residual (..., D) in the residual's dtype.
        Raises:
            ValueError: shapes differ.
        """
        p = self.p if self.training else 0.0
        return dropout_add_layer_norm(x, x_bias, residual, self.weight, self.bias, p=p, eps=self.eps)


def norm_linear(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    norm: nn.LayerNorm,
    weight: Tensor,
    *,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add the branch, normalise, multiply by `weight` (F, D): (result (..., F), new residual)."""
    rows, residual = add_norm(residual, branch, branch_bias, norm, compute_dtype(weight), p=p)
    return _linear(rows, weight, residual, norm), residual


def norm_mlp(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    norm: nn.LayerNorm,
    fc1: nn.Linear,
    fc2: nn.Linear,
    *,
    p: float = 0.0,
    drop: float = 0.0,
    epilogue: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add the branch, normalise, apply an MLP without the bias and dropout of fc2: (result, new residual).

    Args:
        p:        dropout probability of the branch.
        drop:     dropout probability of the hidden values.
        epilogue: as for `mlp`.
    """
    rows, residual = add_norm(residual, branch, branch_bias, norm, compute_dtype(fc1.weight), p=p)
    weights = fc1.weight, fc1.bias, fc2.weight
    if not drop and in_epilogue(epilogue, rows, *weights):
        return launch_mlp(rows, *weights, *_source(residual, norm, rows.dtype)), residual
    hidden = _linear(rows, fc1.weight, residual, norm)
    del rows  # its memory is free for what follows
    return gelu_linear(hidden, fc1.bias, fc2.weight, p=drop), residual


def _linear(rows: Tensor, weight: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
    """rows @ weight.T, for rows that are the norm of a residual.

    The backward pass recomputes the rows from the residual, which is kept anyway. Under torch.compile, rows
    that a kernel writes are kept instead: recomputing them would add a launch to the forward pass.
    """
    parameters = residual, norm.weight, norm.bias
    if torch.compiler.is_compiling() and dispatch.select("layer_norm", *parameters, rows.dtype, norm.eps):
        return linear(rows, weight)
    return linear_recomputing(rows, weight, *_source(residual, norm, rows.dtype))


def _source(residual: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Any, ...]:
    """A function that recomputes the normalised rows, and its arguments."""
    eps = norm.eps

    def recompute(residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(residual, weight, bias, dtype, eps=eps)

    return recompute, residual, norm.weight, norm.bias


def add_norm(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    norm: nn.LayerNorm,
    dtype: torch.dtype,
    *,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Normalised sum of residual and (dropped) branch in `dtype`, and the sum itself."""
    if branch is None:
        return layer_norm(residual, norm.weight, norm.bias, dtype, eps=norm.eps), residual
    normalised, residual = dropout_add_layer_norm(
        branch, branch_bias, residual, norm.weight, norm.bias, p=p, eps=norm.eps
    )
    return normalised, residual
