"""The oracle: LMIM and MAE pre-training in plain PyTorch, readable beside the paper, names as released.

Slow on purpose: explicit softmax attention, each branch apart, every token decoded; the fast form must match.
Source: LMIM (CVPR 2025, arXiv 2503.18746) and its released code; MAE (arXiv 2111.06377) as in MAERec.
Dims: B batch, N tokens, M memory tokens, D width, H heads, L patches, P patch pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.config import ModelConfig

LAYER_NORM_EPS = 1e-6
TARGET_EPS = 1e-5  # the teacher's features are normalised with torch's default


@dataclass
class ReferenceOutput:
    """What a forward pass computes; all patches, in reading order."""

    loss: Tensor  # ()
    loss_recon: Tensor  # ()
    loss_align: Tensor  # ()
    pred: Tensor  # (B, L, D or P)
    target: Tensor  # (B, L, D or P)
    mask: Tensor  # (B, L), 1 is masked
    latent: Tensor  # (B, 1 + visible, D), in the order of ids_keep
    memory: Tensor | None  # (B, 1 + L, D); None without guidance
    ids_keep: Tensor  # (B, visible), by rising noise
    ids_restore: Tensor  # (B, L)


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, height, width, 3) to float (B, 3, height, width) in [-1, 1]; float images pass."""
    if images.dtype == torch.uint8:
        return (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    return images


def sincos_table(width: int, config: ModelConfig) -> Tensor:
    """Fixed 2-D sin-cos positions (1, 1 + L, width): features for x, then for y; the cls row is zero."""
    columns = int(config.num_patches**0.5) if config.pos_grid == "released" else config.grid[1]
    patch = torch.arange(config.num_patches)
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [place.double()[:, None] * frequency for place in (patch % columns, patch // columns)]
    halves = [half for angle in angles for half in (angle.sin(), angle.cos())]
    return F.pad(torch.cat(halves, dim=1).float(), (0, 0, 1, 0))[None]


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, 3, height, width) to (B, L, P), P = patch row, patch column, colour."""
    x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, rows, patch, columns, patch)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def normalise_patches(pixels: Tensor) -> Tensor:
    """Each patch to mean 0 and (unbiased) variance 1."""
    return (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()


def random_masking(images: Tensor, noise: Tensor | None, patches: int, visible: int) -> tuple[Tensor, ...]:
    """The patches with the smallest noise stay: ids_keep (B, visible), ids_restore (B, L), mask (B, L)."""
    if noise is None:
        noise = torch.rand(len(images), patches, device=images.device)
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :visible], ids_restore, (ids_restore >= visible).float()


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (B, K) of x (B, N, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))


def decoder_tokens(x: Tensor, mask_token: Tensor, ids_restore: Tensor) -> Tensor:
    """cls and visible tokens (B, 1 + visible, D) to all tokens in reading order (B, 1 + L, D)."""
    masked = mask_token.expand(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], -1)
    return torch.cat([x[:, :1], gather_tokens(torch.cat([x[:, 1:], masked], dim=1), ids_restore)], dim=1)


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean over features, then over all masked patches of the batch. error (B, L, F), mask (B, L)."""
    return (error.mean(-1) * mask).sum() / mask.sum()


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
    """Scaled dot-product attention, q (B, N, D), k and v (B, M, D), with the weights written out."""
    batch, queries, width = q.shape
    # (B, H, N, D / H) each
    q, k, v = (t.reshape(batch, -1, heads, width // heads).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(width // heads)).softmax(dim=-1)  # (B, H, N, M)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2).reshape(batch, queries, width)


class Attention(nn.Module):
    """Self-attention with timm's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(softmax_attention(q, k, v, self.heads, dropout=0.0))


class Mlp(nn.Module):
    """Two linears with exact GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm ViT block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Image to patch features; a module of its own for the released name."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) to (B, L, D), row-major."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """ViT with cls; of all patches or of those that are kept."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(sincos_table(config.width, config), requires_grad=False)
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        sizes = config.width, config.heads, config.mlp_ratio
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward_encoder(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """(B, 3, height, width) to (B, 1 + kept patches, D)."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        if ids_keep is not None:
            x = gather_tokens(x, ids_keep)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MultiheadAttention(nn.Module):
    """Attention with torch's in_proj names, q from x and k, v from memory."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, N, D), memory (B, M, D) to (B, N, D)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((x, memory, memory), weights, biases, strict=True))
        return self.out_proj(softmax_attention(q, k, v, self.heads, self.dropout if self.training else 0.0))


class DecoderLayer(nn.Module):
    """Post-norm self-attention, cross-attention and FFN (or cross-attention first)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, dropout = config.decoder_width, config.decoder_dropout
        self.self_attn = MultiheadAttention(width, config.decoder_heads, dropout)
        self.multihead_attn = MultiheadAttention(width, config.decoder_heads, dropout)
        self.linear1 = nn.Linear(width, config.decoder_ffn)
        self.linear2 = nn.Linear(config.decoder_ffn, width)
        # After self-attention, cross-attention and FFN.
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=LAYER_NORM_EPS) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.order = config.decoder_order

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, N, D), memory (B, M, D) to (B, N, D)."""
        for step in self.order.split("_"):
            if step == "sa":
                x = self.norm1(x + self.dropout(self.self_attn(x, x)))
            else:
                x = self.norm2(x + self.dropout(self.multihead_attn(x, memory)))
        hidden = self.dropout(F.gelu(self.linear1(x)))
        return self.norm3(x + self.dropout(self.linear2(hidden)))


def initialise(module: nn.Module) -> None:
    """Linear and patch projection xavier-uniform with bias 0; LayerNorm 1 and 0 as torch makes them."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, parameter in module.named_parameters(recurse=False):
        if name in ("cls_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)


class ReferenceLMIM(nn.Module):
    """LMIM pre-training: masked branch, guidance branch, frozen teacher, guided decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_table(width, config), requires_grad=False)
        self.model_maeenc = Encoder(config)
        if config.target == "teacher":
            self.model_maeenc_momentum = Encoder(config).requires_grad_(False)
        self.decoder_embed = nn.Linear(config.width, width)
        self.decoder_embed2 = nn.Linear(config.width, width)
        self.decoder_blocks = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(width, config.target_width)
        self.apply(initialise)

    def make_target(self, images: Tensor) -> Tensor:
        """What the decoder has to predict, (B, L, D or P)."""
        if self.config.target == "teacher":
            with torch.no_grad():
                features = self.model_maeenc_momentum.forward_encoder(images)[:, 1:]
                return F.layer_norm(features, features.shape[-1:], eps=TARGET_EPS)
        pixels = patchify(images, self.config.patch_size)
        return normalise_patches(pixels) if self.config.target == "norm_pixel" else pixels

    def decode(self, latent: Tensor, memory: Tensor, ids_restore: Tensor) -> Tensor:
        """latent (B, 1 + visible, D) and memory (B, M, D) to predictions (B, L, D or P)."""
        x = decoder_tokens(self.decoder_embed(latent), self.mask_token, ids_restore) + self.decoder_pos_embed
        memory = self.decoder_embed2(memory)
        for layer in self.decoder_blocks:
            x = layer(x, memory)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def align(self, masked: Tensor, guidance: Tensor) -> Tensor:
        """Mean squared distance of the two cls features (B, D)."""
        if self.config.align_stop_gradient == "masked":
            masked = masked.detach()
        elif self.config.align_stop_gradient == "guidance":
            guidance = guidance.detach()
        return (masked - guidance).square().mean()

    def forward(self, images: Tensor, guidance: Tensor, noise: Tensor | None = None) -> ReferenceOutput:
        """Losses of a batch.

        Args:
            images:   plain view, float (B, 3, height, width) in [-1, 1] or uint8 (B, height, width, 3).
            guidance: guidance view of the same crops, likewise; not read when config.guidance is off.
            noise:    (B, L) that ranks the patches for masking; None draws it.
        """
        images = to_float(images)
        patches, visible = self.config.num_patches, self.config.num_visible
        ids_keep, ids_restore, mask = random_masking(images, noise, patches, visible)
        latent = self.model_maeenc.forward_encoder(images, ids_keep)
        memory = self.model_maeenc.forward_encoder(to_float(guidance)) if self.config.guidance else None
        target = self.make_target(images)
        pred = self.decode(latent, latent if memory is None else memory, ids_restore)
        loss_recon = masked_mean((pred - target).square(), mask)
        loss_align = loss_recon.new_zeros(()) if memory is None else self.align(latent[:, 0], memory[:, 0])
        losses = loss_recon + self.config.align_weight * loss_align, loss_recon, loss_align
        return ReferenceOutput(*losses, pred, target, mask, latent, memory, ids_keep, ids_restore)


class ReferenceMAE(Encoder):
    """MAE pre-training: the stage that gives LMIM its teacher. Encoder names without prefix, as MAERec's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config
        width = config.decoder_width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_table(width, config), requires_grad=False)
        self.decoder_embed = nn.Linear(config.width, width)
        sizes = width, config.decoder_heads, config.mlp_ratio
        self.decoder_blocks = nn.ModuleList(Block(*sizes) for _ in range(config.mae_decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(width, config.patch_pixels)
        self.apply(initialise)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> ReferenceOutput:
        """Losses of a batch: as ReferenceLMIM.forward, without guidance; the target is normalised pixels."""
        images = to_float(images)
        patches, visible = self.config.num_patches, self.config.mae_num_visible
        ids_keep, ids_restore, mask = random_masking(images, noise, patches, visible)
        latent = self.forward_encoder(images, ids_keep)
        x = decoder_tokens(self.decoder_embed(latent), self.mask_token, ids_restore) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        target = normalise_patches(patchify(images, self.config.patch_size))
        loss = masked_mean((pred - target).square(), mask)
        zero = loss.new_zeros(())
        return ReferenceOutput(loss, loss, zero, pred, target, mask, latent, None, ids_keep, ids_restore)
