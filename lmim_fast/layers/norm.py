"""Post-norm residual add as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmim_fast.ops.dropout import check_probability
from lmim_fast.ops.norm import dropout_add_layer_norm

LAYER_NORM_EPS = 1e-6


class DropoutAddLayerNorm(nn.Module):
    """Dropout of a branch, residual add and LayerNorm in one pass; weight and bias as in nn.LayerNorm.

    Args:
        width: D.
        p:     dropout probability of the branch, in training mode.
        eps:   added to the variance.
    Raises:
        ValueError: p outside [0, 1).
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
            x_bias:   (D,) bias of the linear that made x, where the linear left it out.
        Returns:
            normalised (..., D) in x's dtype, new residual (..., D) in the residual's dtype.
        Raises:
            ValueError: shapes differ.
        """
        p = self.p if self.training else 0.0
        return dropout_add_layer_norm(x, x_bias, residual, self.weight, self.bias, p=p, eps=self.eps)
