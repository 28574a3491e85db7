"""Pre-norm ViT block with timm's parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers.attention import Attention
from lmim_fast.layers.inputs import tokens
from lmim_fast.layers.mlp import Mlp
from lmim_fast.layers.norm import LAYER_NORM_EPS
from lmim_fast.ops import dispatch
from lmim_fast.ops.attention import Segment
from lmim_fast.ops.epilogue import in_epilogue
from lmim_fast.ops.linear import compute_dtype, linear, linear_recomputing
from lmim_fast.ops.mlp import gelu_linear, launch_mlp
from lmim_fast.ops.norm import dropout_add_layer_norm, layer_norm


class Block(nn.Module):
    """timm's vision_transformer.Block, for one batch or for packed rows.

    Args:
        dim:       D.
        num_heads: H.
        mlp_ratio: hidden features of the MLP in widths.
        qkv_bias:  give `attn.qkv` a bias.
        proj_drop: dropout probability after `attn.proj` and both linears of the MLP, in training mode.
        attn_drop: that of the attention weights.
        eps:       of both norms.
        epilogue:  that of the `Mlp`.
    Raises:
        ValueError: D is no multiple of H, a probability outside [0, 1), or an unknown epilogue.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        *,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        eps: float = LAYER_NORM_EPS,
        epilogue: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, epilogue=epilogue)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D) in x's dtype."""
        tokens("x", x, self.attn.qkv.weight)
        segments = [(x.shape[0], x.shape[1])]
        residual, branch, branch_bias = self.forward_packed(x.flatten(0, 1), None, None, segments)
        if branch_bias is not None:
            branch = branch + branch_bias.to(branch.dtype)
        return (residual + branch.to(residual.dtype)).view(x.shape)

    def forward_packed(
        self, residual: Tensor, branch: Tensor | None, branch_bias: Tensor | None, segments: Sequence[Segment]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One block over packed rows; its last residual add is left to the next norm, where it costs nothing.

        Args:
            residual:    (rows, D) residual stream.
            branch:      (rows, D) product that still has to be added to it, or None at the first block.
            branch_bias: (D,) bias of that product, or None.
            segments:    (sequences, tokens) of each group of rows.
        Returns:
            new residual, branch and branch_bias (None where dropout needed the bias added before it).
        """
        attn, mlp = self.attn, self.mlp
        product, residual = norm_linear(residual, branch, branch_bias, self.norm1, attn.qkv)
        branch = attn.forward_packed(product, segments)
        branch, residual = norm_mlp(
            *(residual, branch, attn.proj.bias, self.norm2, mlp.fc1, mlp.fc2),
            p=attn.dropout,
            drop=mlp.dropout,
            epilogue=mlp.epilogue,
        )
        if mlp.dropout:
            return residual, F.dropout(branch + mlp.fc2.bias.to(branch.dtype), mlp.dropout), None
        return residual, branch, mlp.fc2.bias


def norm_linear(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    norm: nn.LayerNorm,
    layer: nn.Linear,
    *,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add the branch, normalise, multiply by `layer`'s weight: (product without bias, new residual)."""
    rows, residual = add_norm(residual, branch, branch_bias, norm, compute_dtype(layer.weight), p=p)
    return _linear(rows, layer.weight, residual, norm), residual


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
    """Add the branch, normalise, run an MLP: (product of fc2 without its bias and dropout, new residual).

    Args:
        p:        dropout probability of the branch.
        drop:     of the hidden values.
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
    """Product of the normalised rows of a residual, without bias.

    The rows are recomputed in the backward pass from the residual, which is kept anyway; not by kernels under
    torch.compile, where that would take another launch in the forward pass.
    """
    parameters = residual, norm.weight, norm.bias
    if torch.compiler.is_compiling() and dispatch.select("layer_norm", *parameters, rows.dtype, norm.eps):
        return linear(rows, weight)
    return linear_recomputing(rows, weight, *_source(residual, norm, rows.dtype))


def _source(residual: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Any, ...]:
    """What normalised rows are recomputed from: a function and its arguments."""
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
