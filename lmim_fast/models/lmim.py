"""LMIM on the fast ops: one packed student pass, a decoder that does only what the loss reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.layers.norm import LAYER_NORM_EPS
from lmim_fast.layers.rows import MaskedRows, PlainRows
from lmim_fast.models.decoder import GuidedLayer, memory_projection
from lmim_fast.models.encoder import Encoder, initialise
from lmim_fast.models.positions import position_table
from lmim_fast.ops.feature_loss import masked_feature_target, masked_mse, masked_pixel_target
from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.masking import select_patches
from lmim_fast.ops.norm import layer_norm
from lmim_fast.ops.tokens import decoder_tokens, mask_table


@dataclass
class LMIMOutput:
    """What a training step reads. pred and target hold masked rows only, in the order of ids_masked."""

    loss: Tensor  # ()
    loss_recon: Tensor  # ()
    loss_align: Tensor  # ()
    pred: Tensor  # (B, M, D or P)
    target: Tensor  # (B, M, D or P) fp32
    latent: Tensor  # (B, 1 + K, D)
    memory: Tensor | None  # (B, 1 + L, D), None without guidance
    ids_visible: Tensor  # (B, K) rising
    ids_masked: Tensor  # (B, M) rising

    @cached_property
    def mask(self) -> Tensor:
        """(B, L), 1 is masked."""
        zeros = self.loss.new_zeros(
            len(self.ids_masked), self.ids_visible.shape[1] + self.ids_masked.shape[1]
        )
        return zeros.scatter(1, self.ids_masked, 1.0)


class LMIM(nn.Module):
    """Masked branch, guidance branch, frozen teacher and guided decoder. State dict names are the release's.

    Equal to `reference.ReferenceLMIM` in loss and gradients for dropout 0, and in distribution otherwise.
    Source: LMIM (CVPR 2025).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(position_table(width, config), requires_grad=False)
        self.model_maeenc = Encoder(config)
        if config.target == "teacher":
            self.model_maeenc_momentum = Encoder(config).requires_grad_(False)
        self.decoder_embed = nn.Linear(config.width, width)
        self.decoder_embed2 = nn.Linear(config.width, width)
        self.decoder_blocks = nn.ModuleList([GuidedLayer(config) for _ in range(config.decoder_depth)])
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(width, config.target_width)
        self.apply(initialise)

    def forward(self, images: Tensor, guidance: Tensor | None, noise: Tensor | None = None) -> LMIMOutput:
        """Losses of a batch.

        Args:
            images:   plain view, float (B, 3, height, width) in [-1, 1] or uint8 (B, height, width, 3).
            guidance: guidance view of the same crops, likewise; not read when config.guidance is off.
            noise:    (B, L) that ranks the patches for masking; None draws it.
        Returns:
            LMIMOutput; loss = loss_recon + align_weight x loss_align.
        Raises:
            ValueError: an image of another layout or size, or guidance missing while config.guidance is on.
        """
        if noise is None:
            noise = torch.rand(images.shape[0], self.config.num_patches, device=images.device)
        ids_visible, ids_masked = select_patches(noise, self.config.num_visible)
        target = self.make_target(images, ids_masked)
        latent, memory = self.encode_views(images, guidance, ids_visible)
        pred = self.decode(latent, latent if memory is None else memory, ids_visible, ids_masked)
        loss_recon = masked_mse(pred, target)
        loss_align = loss_recon.new_zeros(()) if memory is None else self.align(latent[:, 0], memory[:, 0])
        loss = loss_recon + self.config.align_weight * loss_align
        return LMIMOutput(loss, loss_recon, loss_align, pred, target, latent, memory, ids_visible, ids_masked)

    def encode_views(
        self, images: Tensor, guidance: Tensor | None, ids_visible: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Latent (B, 1 + K, D) and memory (B, 1 + L, D) from one pass over packed rows."""
        encoder = self.model_maeenc
        shown = encoder.embed(images, ids_visible)
        if not self.config.guidance:
            return encoder.run(shown.flatten(0, 1), [(shown.shape[0], shown.shape[1])]).view_as(shown), None
        if guidance is None or len(guidance) != len(images):
            got = "none" if guidance is None else f"{len(guidance)}"
            raise ValueError(f"need one guidance view for each of {len(images)} images, got {got}")
        full = encoder.embed(guidance)
        rows = torch.cat([shown.flatten(0, 1), full.flatten(0, 1)])
        segments = [(shown.shape[0], shown.shape[1]), (full.shape[0], full.shape[1])]
        latent, memory = encoder.run(rows, segments).split(
            [sequences * tokens for sequences, tokens in segments]
        )
        return latent.view(shown.shape), memory.view(full.shape)

    @torch.no_grad()
    def make_target(self, images: Tensor, ids_masked: Tensor) -> Tensor:
        """Reconstruction target (B, M, D or P) of the masked patches."""
        if self.config.target == "teacher":
            return masked_feature_target(self.model_maeenc_momentum.encode(images), ids_masked)
        normalise = self.config.target == "norm_pixel"
        return masked_pixel_target(images, ids_masked, self.config.patch_size, normalise=normalise)

    def decode(self, latent: Tensor, memory: Tensor, ids_visible: Tensor, ids_masked: Tensor) -> Tensor:
        """Predictions (B, M, D or P) of the masked patches from latent (B, 1 + K, D) and memory (B, N, D)."""
        rows = self.decode_rows(latent, memory, ids_visible, ids_masked)
        norm = self.decoder_norm
        rows = layer_norm(rows, norm.weight, norm.bias, rows.dtype, eps=norm.eps)
        return linear(rows, self.decoder_pred.weight) + self.decoder_pred.bias.to(rows.dtype)

    def decode_rows(self, latent: Tensor, memory: Tensor, ids_visible: Tensor, ids_masked: Tensor) -> Tensor:
        """Masked rows (B, M, decoder width) after the last decoder layer."""
        x, keys = self.decoder_input(latent, memory, ids_visible, ids_masked)
        rows = x.rows
        for number, (layer, (kv, kv_bias)) in enumerate(zip(self.decoder_blocks, keys, strict=True), start=1):
            rows = layer(x, kv, kv_bias, masked_only=number == len(keys))
            x = PlainRows(rows, x.num_shown)
        return rows

    def decoder_input(
        self, latent: Tensor, memory: Tensor, ids_visible: Tensor, ids_masked: Tensor
    ) -> tuple[MaskedRows | PlainRows, list[tuple[Tensor, Tensor | None]]]:
        """Token rows of the first layer, and each layer's memory keys and values with their bias."""
        dtype = compute_dtype(self.decoder_embed.weight)
        shown = linear(latent, self.decoder_embed.weight)
        rows = decoder_tokens(
            shown, self.decoder_embed.bias, self.mask_token, self.decoder_pos_embed, ids_visible, ids_masked
        )
        table = mask_table(self.mask_token, self.decoder_pos_embed)
        return MaskedRows(rows.to(dtype), table.to(dtype), ids_masked), self.memory_keys(memory)

    def memory_keys(self, memory: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """For each layer, keys and values (B, N, 2 x decoder width) without bias, and the bias."""
        embed = self.decoder_embed2
        layers = [cast(GuidedLayer, layer).multihead_attn for layer in self.decoder_blocks]
        folded = memory_projection(embed, layers)
        if folded is not None:
            products, biases = linear(memory, folded[0]), folded[1]
            return list(zip(products.chunk(len(layers), -1), biases.chunk(len(layers)), strict=True))
        embedded = linear(memory, embed.weight) + embed.bias.to(memory.dtype)
        return [(linear(embedded, layer.kv_weight), layer.kv_bias) for layer in layers]

    def align(self, masked: Tensor, guidance: Tensor) -> Tensor:
        """Mean squared distance of the two cls features (B, D), in fp32."""
        if self.config.align_stop_gradient == "masked":
            masked = masked.detach()
        elif self.config.align_stop_gradient == "guidance":
            guidance = guidance.detach()
        return (masked.float() - guidance.float()).square().mean()
