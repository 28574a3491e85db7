"""MLP with timm's parameter names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers import plain
from lmim_fast.layers.inputs import features
from lmim_fast.layers.parts import hooks_on_all, is_biased_linear
from lmim_fast.ops.dropout import check_probability
from lmim_fast.ops.epilogue import check_setting
from lmim_fast.ops.mlp import mlp


class Mlp(nn.Module):
    """timm's Mlp: two linears with exact GELU between, dropout after each.

    Args:
        in_features:     D.
        hidden_features: F; D by default.
        out_features:    features of the result; D by default.
        drop:            dropout probability, in training mode.
        epilogue:        "auto", "on" or "off": GELU in the epilogue of the matmuls (`ops/epilogue.py`).
    Raises:
        ValueError: drop is outside [0, 1), or the epilogue is unknown.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        drop: float = 0.0,
        epilogue: str = "auto",
    ) -> None:
        super().__init__()
        check_probability(drop)
        hidden_features = hidden_features or in_features
        self.drop, self.epilogue = drop, check_setting(epilogue)
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., out_features)."""
        if plain.fits(x, self.fc1._parameters.get("weight")) or not self.reads_weights():
            return self.forward_parts(x, last=True)
        x = features("x", x, self.fc1.weight)
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight
        branch = mlp(x, *weights, p=self.dropout, epilogue=self.epilogue)
        return F.dropout(branch + self.fc2.bias.to(branch.dtype), self.dropout)

    def reads_weights(self) -> bool:
        """True if both linears are plain; others are called (`layers/parts.py`)."""
        parts = self._modules  # faster than attributes
        return is_biased_linear(parts["fc1"]) and is_biased_linear(parts["fc2"]) and not hooks_on_all()

    def forward_parts(self, x: Tensor, *, last: bool = False) -> Tensor:
        """`forward` by calls of the parts; `last` as for `plain.linear`."""
        p = self.dropout
        return plain.dropped(plain.mlp(x, self.fc1, self.fc2, p, last=last), p)

    @property
    def dropout(self) -> float:
        """Dropout probability: 0 in eval mode."""
        return self.drop if self.training else 0.0
