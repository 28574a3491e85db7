"""ViT encoder on the fast ops: packed rows, timm's parameter names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.models.positions import position_table
from lmim_fast.ops.attention import Segment, self_attention
from lmim_fast.ops.gelu import bias_gelu
from lmim_fast.ops.linear import compute_dtype, linear, linear_recomputing
from lmim_fast.ops.norm import dropout_add_layer_norm, layer_norm
from lmim_fast.ops.patch_embed import patch_embed

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Self-attention weights with timm's names; the output bias is left to the op that adds the residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, qkv: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Product of the qkv linear (rows, 3D) to the output product (rows, D), without its bias."""
        return linear(self_attention(qkv, self.qkv.bias, self.heads, segments), self.proj.weight)


class Mlp(nn.Module):
    """MLP weights with timm's names; the output bias is left to the op that adds the residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Product of fc1 (rows, F) to that of fc2 (rows, D), without its bias."""
        activated = bias_gelu(hidden, self.fc1.bias)
        return linear_recomputing(activated, self.fc2.weight, bias_gelu, hidden, self.fc1.bias)


class Block(nn.Module):
    """Pre-norm ViT block that leaves its last residual add to the next norm, which does it in one pass."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(
        self, residual: Tensor, branch: Tensor | None, branch_bias: Tensor | None, segments: Sequence[Segment]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block over packed rows.

        Args:
            residual:    (rows, D) residual stream.
            branch:      (rows, D) product that still has to be added to it, or None at the first block.
            branch_bias: (D,) bias of that product.
            segments:    (sequences, tokens) of each group of rows.
        Returns:
            new residual, branch and branch_bias.
        """
        product, residual = norm_linear(residual, branch, branch_bias, self.norm1, self.attn.qkv)
        branch = self.attn(product, segments)
        product, residual = norm_linear(residual, branch, self.attn.proj.bias, self.norm2, self.mlp.fc1)
        return residual, self.mlp(product), self.mlp.fc2.bias


def norm_linear(
    residual: Tensor, branch: Tensor | None, branch_bias: Tensor | None, norm: nn.LayerNorm, layer: nn.Linear
) -> tuple[Tensor, Tensor]:
    """Add the branch, normalise, multiply by `layer`'s weight: (product without bias, new residual).

    The normalised rows are made again in the backward pass from the residual, which is kept anyway.
    """
    dtype = compute_dtype(layer.weight)
    normalised, residual = add_norm(residual, branch, branch_bias, norm, dtype)

    def recompute(residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(residual, weight, bias, dtype, eps=norm.eps)

    product = linear_recomputing(normalised, layer.weight, recompute, residual, norm.weight, norm.bias)
    return product, residual


def add_norm(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    norm: nn.LayerNorm,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Normalised sum of residual and branch in `dtype`, and the sum itself."""
    if branch is None:
        return layer_norm(residual, norm.weight, norm.bias, dtype, eps=norm.eps), residual
    normalised, residual = dropout_add_layer_norm(
        branch, branch_bias, residual, norm.weight, norm.bias, eps=norm.eps
    )
    return normalised, residual


def run_blocks(
    blocks: nn.ModuleList, norm: nn.LayerNorm, rows: Tensor, segments: Sequence[Segment], dtype: torch.dtype
) -> Tensor:
    """Residual rows (rows, D) through all blocks and the final norm, in `dtype`."""
    residual, branch, branch_bias = rows, None, None
    for block in blocks:
        residual, branch, branch_bias = block(residual, branch, branch_bias, segments)
    return add_norm(residual, branch, branch_bias, norm, dtype)[0]


class PatchEmbed(nn.Module):
    """Holds the patch convolution's weights under the released name."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)


class Encoder(nn.Module):
    """ViT with cls token: `embed` and `run` for packed rows, `encode` for one batch of images."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.half_residual = config.residual == "bf16"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(position_table(config.width, config), requires_grad=False)
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        blocks = [Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def embed(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Tokens of all patches, or of the patches `ids` (B, K): (B, 1 + K, D), cls first."""
        projection = self.patch_embed.proj
        assert projection.bias is not None
        tokens = patch_embed(images, projection.weight, projection.bias, self.pos_embed, self.cls_token, ids)
        half = self.half_residual and compute_dtype(projection.weight) == torch.bfloat16
        return tokens.bfloat16() if half else tokens

    def run(self, rows: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Packed tokens (rows, D) to packed features (rows, D)."""
        return run_blocks(self.blocks, self.norm, rows, segments, compute_dtype(self.patch_embed.proj.weight))

    def encode(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Images, as `patch_embed` takes them, to features (B, 1 + K, D)."""
        tokens = self.embed(images, ids)
        return self.run(tokens.flatten(0, 1), [(tokens.shape[0], tokens.shape[1])]).view_as(tokens)


def initialise(module: nn.Module) -> None:
    """For `apply`: linears and patch projection xavier-uniform, bias 0; cls, mask token normal(0, 0.02)."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for name in ("cls_token", "mask_token"):
        token = getattr(module, name, None)
        if isinstance(token, nn.Parameter):
            nn.init.normal_(token, std=0.02)
