"""Pre-norm ViT block with timm's parameter names: for packed rows, and as timm's module for one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers import plain
from lmim_fast.layers.attention import Attention
from lmim_fast.layers.drop_path import drop_path
from lmim_fast.layers.inputs import tokens
from lmim_fast.layers.mlp import Mlp
from lmim_fast.layers.norm import LAYER_NORM_EPS, add_norm, norm_linear, norm_mlp
from lmim_fast.layers.parts import hooks_on_all, is_norm, is_plain
from lmim_fast.ops.attention import Segment, product_bias
from lmim_fast.ops.dropout import check_probability
from lmim_fast.ops.linear import compute_dtype


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
        if not self.reads_weights():
            return self.forward_parts(residual, branch, branch_bias, segments)
        return self.forward_fused(residual, branch, branch_bias, segments)

    def forward_fused(
        self, residual: Tensor, branch: Tensor | None, branch_bias: Tensor | None, segments: Sequence[Segment]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`forward` for plain parts, whose weights it reads."""
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

    def reads_weights(self) -> bool:
        """True if all parts are plain, and theirs; others are called (`layers/parts.py`)."""
        parts: dict[str, Any] = self._modules  # faster than attributes
        attn, mlp = parts["attn"], parts["mlp"]
        return (
            is_plain(attn, Attention)
            and attn.reads_weights()
            and is_plain(mlp, Mlp)
            and mlp.reads_weights()
            and is_norm(parts["norm1"])
            and is_norm(parts["norm2"])
        )

    def forward_parts(
        self, residual: Tensor, branch: Tensor | None, branch_bias: Tensor | None, segments: Sequence[Segment]
    ) -> tuple[Tensor, Tensor, None]:
        """`forward` by calls of the parts, which get rows (rows, D).

        An `attn` or `mlp` that is replaced or hooked itself gets (B, N, D), segment after segment.
        """
        attn, mlp, dtype = self.attn, self.mlp, compute_dtype(residual)
        rows, residual = add_norm(residual, branch, branch_bias, self.norm1, dtype)
        whole = is_plain(attn, Attention) and not hooks_on_all()
        branch = attn.forward_parts(rows, segments) if whole else plain.each(attn, rows, segments)
        rows, residual = add_norm(residual, self._drop_path(branch, segments), None, self.norm2, dtype)
        whole = is_plain(mlp, Mlp) and not hooks_on_all()
        branch = mlp.forward(rows) if whole else plain.each(mlp, rows, segments)
        return residual, self._drop_path(branch, segments).to(dtype), None

    def _drop_path(self, branch: Tensor, segments: Sequence[Segment]) -> Tensor:
        """A branch (..., D) after stochastic depth, in training mode."""
        if not (self.training and self.drop_path):
            return branch
        return drop_path(branch.flatten(0, -2), segments, self.drop_path).view(branch.shape)

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
        attn, mlp = self.attn, self.mlp
        own = is_plain(attn, Attention) and is_plain(mlp, Mlp) and not hooks_on_all()
        own = own and not (self.training and self.drop_path)
        if own and plain.fits(x, attn.qkv._parameters.get("weight")):
            x = x + attn.forward_parts(plain.norm(x, self.norm1), None)
            return x + mlp.forward_parts(plain.norm(x, self.norm2))
        if not self.reads_weights():
            segments = [(x.shape[0], x.shape[1])]
            x = x + self._drop_path(attn(plain.norm(x, self.norm1)), segments).to(x.dtype)
            return x + self._drop_path(mlp(plain.norm(x, self.norm2)), segments).to(x.dtype)
        tokens("x", x, attn.qkv.weight)
        segments = [(x.shape[0], x.shape[1])]
        residual, branch, branch_bias = self.forward_fused(x.flatten(0, 1), None, None, segments)
        residual, branch = residual.view(x.shape), branch.view(x.shape)
        if branch_bias is not None:
            branch = branch + branch_bias.to(branch.dtype)
        return residual + branch.to(residual.dtype)
