"""Residual add and LayerNorm: as a module, and in front of a linear or an MLP."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers import plain
from lmim_fast.layers.parts import hooks_on_all, is_norm
from lmim_fast.ops import dispatch, gelu, norm_step, sublayers
from lmim_fast.ops.dropout import check_probability, settled_seed
from lmim_fast.ops.epilogue import in_epilogue
from lmim_fast.ops.linear import compute_dtype, linear, linear_recomputing
from lmim_fast.ops.mlp import gelu_linear, launch_mlp
from lmim_fast.ops.norm import dropout_add_layer_norm, layer_norm
from lmim_fast.ops.norm import takes as norm_takes
from lmim_fast.ops.operators.operator import direct

LAYER_NORM_EPS = 1e-6


class Norm(Protocol):
    """What is read of a LayerNorm."""

    @property
    def weight(self) -> Tensor:
        """(D,) scale."""

    @property
    def bias(self) -> Tensor:
        """(D,) shift."""

    @property
    def eps(self) -> float:
        """Added to the variance."""


class Linear(Protocol):
    """What is read of a linear."""

    @property
    def weight(self) -> Tensor:
        """(F, D)."""

    @property
    def bias(self) -> Tensor:
        """(F,)."""


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
        if plain.has_few_rows(x) and x.dtype == residual.dtype == self.weight.dtype:
            total = residual + plain.dropped(x if x_bias is None else x + x_bias, p)
            return F.layer_norm(total, total.shape[-1:], self.weight, self.bias, self.eps), total
        return dropout_add_layer_norm(x, x_bias, residual, self.weight, self.bias, p=p, eps=self.eps)

    def shared(
        self, x: Tensor, residual: Tensor, x_bias: Tensor | None, first: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """`forward` for rows that several ops read: their gradients are added where the rows are made.

        Args:
            x:        (B, N, D), and so the others as for `forward`.
            first:    tokens that are read apart from the others; 0: none are.
        Returns:
            the normalised rows, those from token `first` on if that is above 0, and once more the latter, or
            all; each for one reader.
        """
        p = self.p if self.training else 0.0
        norm = _one_step(residual, x, x_bias, self, x.dtype, p, dims=3)
        if norm is not None:
            return sublayers.shared_norm(norm, first)
        rows = self(x, residual, x_bias)[0]
        if not first:
            return rows, None, rows
        chosen = rows[:, first:].contiguous()
        return rows, chosen, chosen


def norm_linear(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    norm: Norm,
    weight: Tensor,
    *,
    p: float = 0.0,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the branch, normalise, multiply by `weight` (F, D): (result (..., F), new residual).

    Args:
        p:     dropout probability of the branch.
        added: as for `linear`.
    """
    dtype = compute_dtype(weight)
    inputs = _one_step(residual, branch, branch_bias, norm, dtype, p, weight)
    if inputs is not None:
        return sublayers.norm_linear(inputs, weight, added)
    rows, residual = fused_add_norm(residual, branch, branch_bias, norm, dtype, p=p)
    return _linear(rows, weight, residual, norm, added), residual


def norm_mlp(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    norm: Norm,
    fc1: Linear,
    fc2: Linear,
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
    weights, dtype = (fc1.weight, fc1.bias, fc2.weight), compute_dtype(fc1.weight)
    inside = not drop and in_epilogue(epilogue, residual, *weights, dtype)
    inputs = _one_step(residual, branch, branch_bias, norm, dtype, p, *weights)
    if inputs is not None and (inside or gelu.takes(fc1.bias, dtype)):
        seed = settled_seed(drop, None, residual.device)
        return sublayers.norm_mlp(inputs, *weights, seed=seed, p=drop, epilogue=inside)
    rows, residual = fused_add_norm(residual, branch, branch_bias, norm, dtype, p=p)
    if inside:
        return launch_mlp(rows, *weights), residual
    hidden = _linear(rows, fc1.weight, residual, norm)
    del rows  # its memory is free for what follows
    return gelu_linear(hidden, fc1.bias, fc2.weight, p=drop), residual


def _one_step(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    norm: Norm,
    dtype: torch.dtype,
    p: float,
    *weights: Tensor,
    dims: int = 2,
) -> norm_step.Norm | None:
    """The norm, where kernels run it on rows of `dims` dimensions with what is behind it; else None."""
    tensors = residual, branch, branch_bias, norm.weight, norm.bias
    if residual.dim() != dims or not direct(*tensors, *weights) or not norm_takes(*tensors, dtype):
        return None
    seed = settled_seed(p, None, residual.device)
    return norm_step.Norm(branch, branch_bias, residual, norm.weight, norm.bias, seed, p, norm.eps, dtype)


def _linear(
    rows: Tensor, weight: Tensor, residual: Tensor, norm: Norm, added: Tensor | None = None
) -> Tensor:
    """rows @ weight.T, for rows that are the norm of a residual.

    The backward pass recomputes the rows from the residual, which is kept anyway. Under torch.compile, rows
    that a kernel writes are kept instead: recomputing them would add a launch to the forward pass.
    """
    parameters = residual, norm.weight, norm.bias
    if torch.compiler.is_compiling() and dispatch.takes("layer_norm", parameters, None, rows.dtype):
        return linear(rows, weight, added=added)
    dtype, eps = rows.dtype, norm.eps

    def recompute(residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(residual, weight, bias, dtype, eps=eps)

    return linear_recomputing(rows, weight, recompute, *parameters, added=added)


def add_norm(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    norm: nn.Module,
    dtype: torch.dtype,
    *,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Normalised sum of residual and (dropped) branch in `dtype`, and the sum itself.

    A norm that is no longer plain is called with the sum.
    """
    if is_norm(norm) and not hooks_on_all():
        return fused_add_norm(residual, branch, branch_bias, norm, dtype, p=p)
    if branch is not None:
        branch = branch if branch_bias is None else branch + branch_bias.to(branch.dtype)
        residual = residual + plain.dropped(branch, p).to(residual.dtype)
    return norm(residual).to(dtype), residual


def fused_add_norm(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    norm: Norm,
    dtype: torch.dtype,
    *,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`add_norm` by the weights of a plain norm."""
    if branch is None:
        return layer_norm(residual, norm.weight, norm.bias, dtype, eps=norm.eps), residual
    weights = residual, norm.weight, norm.bias
    return dropout_add_layer_norm(branch, branch_bias, *weights, p=p, eps=norm.eps)
