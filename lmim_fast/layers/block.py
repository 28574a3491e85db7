"""Pre-norm ViT block with timm's parameter names."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers.attention import Attention
from lmim_fast.layers.inputs import tokens
from lmim_fast.layers.mlp import Mlp
from lmim_fast.layers.norm import LAYER_NORM_EPS, norm_linear, norm_mlp
from lmim_fast.ops.attention import Segment


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
