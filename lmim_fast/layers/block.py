"""Pre-norm ViT block with timm's parameter names: for packed rows, and as timm's module for one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers import plain
from lmim_fast.layers.attention import Attention
from lmim_fast.layers.drop_path import drop_path
from lmim_fast.layers.inputs import tokens
from lmim_fast.layers.mlp import Mlp
from lmim_fast.layers.norm import LAYER_NORM_EPS, norm_linear, norm_mlp
from lmim_fast.ops.attention import Segment, product_bias
from lmim_fast.ops.dropout import check_probability


class PackedBlock(nn.Module):
    """ViT block over packed rows; its last residual add is left to the next norm, where it costs nothing.

    This form is `forward` because hooks (FSDP's, checkpointing's) act on calls only. Arguments and errors are
    those of `Block`.
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
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_probability(drop_path)
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, epilogue=epilogue)

    def forward(
        self, residual: Tensor, branch: Tensor | None, branch_bias: Tensor | None, segments: Sequence[Segment]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One block.

        Args:
            residual:    (rows, D) residual stream.
            branch:      (rows, D) matmul result that is still to be added to it; None at the first block.
            branch_bias: (D,) bias of the branch, or None.
            segments:    (sequences, tokens) of each group of rows.
        Returns:
            new residual, branch and branch_bias; the bias is None if dropout needed it added first.
        """
        attn, mlp = self.attn, self.mlp
        added = product_bias(attn.qkv.bias)
        qkv, residual = norm_linear(residual, branch, branch_bias, self.norm1, attn.qkv.weight, added=added)
        branch = attn.forward_packed(qkv, segments, added=added is not None)
        branch_bias, p = attn.proj.bias, attn.dropout
        if self.training and self.drop_path:
            branch, branch_bias, p = self._thin(branch, branch_bias, p, segments), None, 0.0
        branch, residual = norm_mlp(
            *(residual, branch, branch_bias, self.norm2, mlp.fc1, mlp.fc2),
            p=p,
            drop=mlp.dropout,
            epilogue=mlp.epilogue,
        )
        if self.training and self.drop_path:
            return residual, self._thin(branch, mlp.fc2.bias, mlp.dropout, segments), None
        if mlp.dropout:
            return residual, F.dropout(branch + mlp.fc2.bias.to(branch.dtype), mlp.dropout), None
        return residual, branch, mlp.fc2.bias

    def _thin(self, branch: Tensor, bias: Tensor, p: float, segments: Sequence[Segment]) -> Tensor:
        """Branch with its bias, after dropout with probability p and stochastic depth."""
        return drop_path(F.dropout(branch + bias.to(branch.dtype), p), segments, self.drop_path)


class Block(PackedBlock):
    """timm's vision_transformer.Block.

    Args:
        dim:       D.
        num_heads: H.
        mlp_ratio: hidden features of the MLP as a multiple of D.
        qkv_bias:  `attn.qkv` has a bias.
        proj_drop: dropout probability after `attn.proj` and both linears of the MLP, in training mode.
        attn_drop: dropout probability of the attention weights, in training mode.
        eps:       of both norms.
        epilogue:  of the `Mlp`.
        drop_path: probability that a sequence skips a branch (stochastic depth), in training mode.
    Raises:
        ValueError: D is no multiple of H, a probability is outside [0, 1), or the epilogue is unknown.
    """

    # The signature differs on purpose: a Block has the parameters of a PackedBlock, not its interface.
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, N, D) to (B, N, D) in x's dtype.

        Raises:
            ValueError: the shape, dtype or device of x does not fit.
        """
        attn = self.attn
        if plain.is_plain(x, attn.qkv.weight) and not (self.training and self.drop_path):
            x = x + attn.forward_plain(plain.norm(x, self.norm1))
            return x + self.mlp.forward_plain(plain.norm(x, self.norm2))
        tokens("x", x, attn.qkv.weight)
        segments = [(x.shape[0], x.shape[1])]
        residual, branch, branch_bias = super().forward(x.flatten(0, 1), None, None, segments)
        if branch_bias is not None:
            branch = branch + branch_bias.to(branch.dtype)
        return (residual + branch.to(residual.dtype)).view(x.shape)
