"""ViT encoder on the fast ops: packed rows, timm's parameter names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.layers.block import PackedBlock
from lmim_fast.layers.norm import LAYER_NORM_EPS, add_norm
from lmim_fast.layers.parts import has_tensors, hooks_on_all, is_plain
from lmim_fast.ops.attention import Segment
from lmim_fast.ops.linear import compute_dtype
from lmim_fast.ops.masking import gather_rows
from lmim_fast.ops.patch_embed import normalise_images, patch_embed_packed


def build_blocks(
    depth: int, width: int, heads: int, config: ModelConfig, *, drop_path: float = 0.0
) -> nn.ModuleList:
    """`depth` blocks of this width; MLP ratio and GELU epilogue are the config's.

    Stochastic depth rises linearly from 0 in the first block to `drop_path` in the last.
    """
    rates = [drop_path * number / max(depth - 1, 1) for number in range(depth)]
    ratio, epilogue = config.mlp_ratio, config.gelu_epilogue
    return nn.ModuleList(
        PackedBlock(width, heads, ratio, qkv_bias=True, epilogue=epilogue, drop_path=rate) for rate in rates
    )


def run_blocks(
    blocks: nn.ModuleList, norm: nn.Module, rows: Tensor, segments: Sequence[Segment], dtype: torch.dtype
) -> Tensor:
    """Residual rows (rows, D) through all blocks and the final norm, in `dtype`."""
    residual, branch, branch_bias = rows, None, None
    for block in blocks:
        residual, branch, branch_bias = block(residual, branch, branch_bias, segments)
    return add_norm(residual, branch, branch_bias, norm, dtype)[0]


class PatchEmbed(nn.Module):
    """The patch projection, under the released name."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, height, width) in [-1, 1] to tokens (B, L, D) before positions, row-major."""
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens

    def plain_projection(self) -> nn.Conv2d | None:
        """The projection if its weights may be read; None if it has to be called (`layers/parts.py`)."""
        proj = self._modules["proj"]
        if not is_plain(self, PatchEmbed) or not is_plain(proj, nn.Conv2d) or hooks_on_all():
            return None
        options = proj.stride, proj.padding, proj.dilation, proj.groups
        if not has_tensors(proj) or proj.bias is None or options != (proj.kernel_size, (0, 0), (1, 1), 1):
            return None
        return proj


class Encoder(nn.Module):
    """ViT with cls token: `embed` and `run` for packed rows of several views, `encode` for one.

    These methods are its entry, not a call: hooks on an Encoder do not fire, those on its parts do.
    """

    def __init__(self, config: ModelConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.grid = config.grid
        self.bf16_residual = config.residual == "bf16"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(position_table(config.width, config), requires_grad=False)
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.blocks = build_blocks(config.depth, config.width, config.heads, config, drop_path=drop_path)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def embed(self, views: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Tokens (rows, D) of the views in order; a view is images, and patches (B, K) or None for all.

        Raises:
            ValueError: as `patch_embed`, or a patch embedding that took the place of ours gives another
                number of tokens than there are positions.
        """
        projection = self._projection()
        if projection is None:
            return torch.cat([self._embed_view(*view).flatten(0, 1) for view in views])
        assert projection.bias is not None
        parameters = projection.weight, projection.bias, self.pos_embed, self.cls_token
        return patch_embed_packed(views, *parameters, dtype=self.residual_dtype())

    def _projection(self) -> nn.Conv2d | None:
        """The patch projection, or None if the patch embedding is called."""
        embedding = self._modules["patch_embed"]
        return embedding.plain_projection() if isinstance(embedding, PatchEmbed) else None

    def _embed_view(self, images: Tensor, ids: Tensor | None) -> Tensor:
        """Tokens (B, 1 + K, D) of a view by a call of the patch embedding."""
        patches, place = self.patch_embed(normalise_images(images)), self.pos_embed[:, 1:]
        if patches.shape[1] != place.shape[1]:
            raise ValueError(
                f"images {tuple(images.shape)} give {patches.shape[1]} patches, not {place.shape[1]}"
            )
        tokens = patches.to(place.dtype) + place
        if ids is not None:
            tokens = gather_rows(tokens, ids)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return torch.cat([cls, tokens], dim=1).to(self.residual_dtype())

    def compute_dtype(self) -> torch.dtype:
        """The dtype that matmuls run in."""
        projection = self._projection()
        return compute_dtype(self.cls_token if projection is None else projection.weight)

    def residual_dtype(self) -> torch.dtype:
        """Dtype of the residual stream: bf16 if the config says so and matmuls run in bf16."""
        bf16 = self.bf16_residual and self.compute_dtype() == torch.bfloat16
        return torch.bfloat16 if bf16 else self.pos_embed.dtype

    def run(self, rows: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Packed tokens (rows, D) to packed features (rows, D)."""
        return run_blocks(self.blocks, self.norm, rows, segments, self.compute_dtype())

    def encode(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Images, as `patch_embed` takes them, to features (B, 1 + K, D) of patches `ids` or of all."""
        segment = len(images), self.pos_embed.shape[1] if ids is None else 1 + ids.shape[1]
        return self.run(self.embed([(images, ids)]), [segment]).unflatten(0, segment)


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


def position_table(width: int, config: ModelConfig) -> Tensor:
    """(1, 1 + L, width) fp32: half of the features for x, half for y, sin then cos; the cls row is zero.

    config.pos_grid "released" lays the patches out on a square grid, as the released checkpoints do.
    """
    columns = int(config.num_patches**0.5) if config.pos_grid == "released" else config.grid[1]
    patch = torch.arange(config.num_patches, dtype=torch.float64)
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    x = (patch % columns)[:, None] * frequency
    y = (patch // columns)[:, None] * frequency
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
    return torch.cat([table.new_zeros(1, width), table]).float()[None]
