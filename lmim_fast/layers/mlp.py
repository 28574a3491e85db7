"""MLP with timm's parameter names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers.inputs import features
from lmim_fast.ops.dropout import check_probability
from lmim_fast.ops.linear import linear
from lmim_fast.ops.mlp import gelu_linear, mlp


class Mlp(nn.Module):
    """timm's Mlp: two linears with exact GELU between, dropout after each.

    Args:
        in_features:     D.
        hidden_features: F, D where it is left out.
        out_features:    D of the result, D where it is left out.
        drop:            dropout probability, in training mode.
    Raises:
        ValueError: drop outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_probability(drop)
        hidden_features = hidden_features or in_features
        self.drop = drop
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., out_features)."""
        x = features("x", x, self.fc1.weight)
        product = feed_forward(x, self.fc1, self.fc2.weight, self.dropout)
        return F.dropout(product + self.fc2.bias.to(product.dtype), self.dropout)

    def forward_packed(self, hidden: Tensor) -> Tensor:
        """Product of fc1 (..., F), taken over, to that of fc2 (..., D); without biases and last dropout."""
        return gelu_linear(hidden, self.fc1.bias, self.fc2.weight, p=self.dropout)

    @property
    def dropout(self) -> float:
        """Dropout in force: 0 in eval mode."""
        return self.drop if self.training else 0.0


def feed_forward(x: Tensor, layer: nn.Linear, weight: Tensor, p: float) -> Tensor:
    """dropout(gelu(layer(x))) @ weight.T for x in the dtype of the products, which is kept for backward."""
    if p:
        return gelu_linear(linear(x, layer.weight), layer.bias, weight, p=p)
    return mlp(x, layer.weight, layer.bias, weight)
