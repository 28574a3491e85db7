"""LMIM on the fast ops: one packed student pass, a decoder that does only what the loss reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.layers.decoder_layer import PackedDecoderLayer
from lmim_fast.layers.decoder_rows import MaskedRows, Memory, PlainRows
from lmim_fast.layers.norm import LAYER_NORM_EPS, add_norm
from lmim_fast.layers.parts import is_biased_linear
from lmim_fast.layers.plain import product_and_bias
from lmim_fast.models.decoder import build_layers, memory_projection
from lmim_fast.models.encoder import Encoder, initialise, position_table
from lmim_fast.models.objective import PretrainOutput, Target, choose_patches
from lmim_fast.ops.align import split_aligned
from lmim_fast.ops.attention import product_bias
from lmim_fast.ops.linear import shared_input_linears
from lmim_fast.ops.tokens import mask_table, shared_decoder_tokens


class LMIM(nn.Module):
    """Masked branch, guidance branch, frozen teacher and guided decoder. State dict names are the release's.

    Equal to `reference.ReferenceLMIM` in loss and gradients for dropout 0, and in distribution otherwise.
    Source: LMIM (CVPR 2025).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Numbers of its own are constants in a compiled graph.
        self.num_patches, self.num_visible = config.num_patches, config.num_visible
        width = config.decoder_width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(position_table(width, config), requires_grad=False)
        self.model_maeenc = Encoder(config)
        if config.target == "teacher":
            self.model_maeenc_momentum = Encoder(config).requires_grad_(False)
        self.decoder_embed = nn.Linear(config.width, width)
        self.decoder_embed2 = nn.Linear(config.width, width)
        self.decoder_blocks = build_layers(config)
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(width, config.target_width)
        self.apply(initialise)

    def forward(
        self,
        images: Tensor,
        guidance: Tensor | None,
        noise: Tensor | None = None,
        *,
        patches: tuple[Tensor, Tensor] | None = None,
    ) -> PretrainOutput:
        """Losses of a batch.

        Args:
            images:   plain view, float (B, 3, height, width) in [-1, 1] or uint8 (B, height, width, 3).
            guidance: guidance view of the same crops, likewise; not read when config.guidance is off.
            noise:    (B, L) that ranks the patches for masking; None draws it.
            patches:  ids of the visible (B, K) and of the masked patches (B, L - K), both rising, instead of
                      noise.
        Returns:
            PretrainOutput; loss = loss_recon + align_weight x loss_align.
        Raises:
            ValueError: an image of another layout or size, guidance missing while config.guidance is on, or
                patches of another number.
        """
        ids_visible, ids_masked = choose_patches(images, noise, patches, self.num_patches, self.num_visible)
        target = self.make_target(images)
        latent, memory, loss_align = self.encode_views(images, guidance, ids_visible)
        product, bias = self.decode(latent, latent if memory is None else memory, ids_visible, ids_masked)
        loss_recon = target.loss(product, bias, ids_masked)
        loss = loss_recon + self.config.align_weight * loss_align
        return PretrainOutput(
            loss, loss_recon, loss_align, latent, memory, ids_visible, ids_masked, product, bias, target
        )

    def encode_views(
        self, images: Tensor, guidance: Tensor | None, ids_visible: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Latent (B, 1 + K, D), memory (B, 1 + L, D), alignment loss (), from one pass over packed rows."""
        encoder, batch, visible = self.model_maeenc, len(images), 1 + ids_visible.shape[1]
        if not self.config.guidance:
            latent = encoder.encode(images, ids_visible)
            return latent, None, latent.new_zeros((), dtype=torch.float32)
        if guidance is None or len(guidance) != batch:
            got = "none" if guidance is None else f"{len(guidance)}"
            raise ValueError(f"need one guidance view for each of {batch} images, got {got}")
        full = 1 + self.num_patches
        rows = encoder.embed([(images, ids_visible), (guidance, None)])
        features = encoder.run(rows, [(batch, visible), (batch, full)])
        return split_aligned(features, batch, visible, full, stop_gradient=self.config.align_stop_gradient)

    @torch.no_grad()
    def make_target(self, images: Tensor) -> Target:
        """The target that the masked patches of the images are reconstructed to."""
        config, features = self.config, None
        if config.target == "teacher":
            features = self.model_maeenc_momentum.encode(images)
        return Target(images, features, config.patch_size, config.target == "norm_pixel")

    def decode(
        self, latent: Tensor, memory: Tensor, ids_visible: Tensor, ids_masked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predictions (B, M, D or P) and their bias (D or P,) from latent (B, 1 + K, D), memory (B, N, D).

        The bias is still to be added; it is zero if the product has it already.
        """
        rows = self.decode_rows(latent, memory, ids_visible, ids_masked)
        return product_and_bias(
            add_norm(rows, None, None, self.decoder_norm, rows.dtype)[0], self.decoder_pred
        )

    def decode_rows(self, latent: Tensor, memory: Tensor, ids_visible: Tensor, ids_masked: Tensor) -> Tensor:
        """Masked rows (B, M, decoder width) after the last decoder layer."""
        x, memories = self.decoder_input(latent, memory, ids_visible, ids_masked)
        last = len(memories) - 1
        for number, (layer, own) in enumerate(zip(self.decoder_blocks, memories, strict=True)):
            x = layer(x, own, masked_only=number == last, next_masked_only=number + 1 == last)
        return x.rows

    def decoder_input(
        self, latent: Tensor, memory: Tensor, ids_visible: Tensor, ids_masked: Tensor
    ) -> tuple[PlainRows, Sequence[Memory | Tensor]]:
        """Token rows of the first layer, and each layer's memory."""
        visible, bias = product_and_bias(latent, self.decoder_embed)
        position, token = self.decoder_pos_embed, self.mask_token
        rows, shown = shared_decoder_tokens(
            visible, bias, token, position, ids_visible, ids_masked, dtype=visible.dtype
        )
        table = mask_table(token, position).to(visible.dtype)
        return MaskedRows(rows, shown, table, ids_masked), self.memories(memory)

    def memories(self, memory: Tensor) -> Sequence[Memory | Tensor]:
        """For each layer, what its rows attend to, from (B, N, D): projected for those that read weights."""
        embed, layers = self.decoder_embed2, list(self.decoder_blocks)
        reads = [isinstance(layer, PackedDecoderLayer) and layer.reads_weights() for layer in layers]
        attentions = [
            cast(PackedDecoderLayer, layer).multihead_attn.projections()
            for layer, read in zip(layers, reads, strict=True)
            if read
        ]
        folded = None
        if all(reads) and is_biased_linear(embed):
            folded = memory_projection(embed, attentions)
        if folded is not None:
            weights, biases = (stacked.chunk(len(layers)) for stacked in folded)
        else:
            memory, bias = product_and_bias(memory, embed)
            memory = memory + bias.to(memory.dtype)
            if not attentions:
                return [memory] * len(layers)
            weights, biases = zip(*((layer.kv_weight, layer.kv_bias) for layer in attentions), strict=True)
        added = [product_bias(bias) for bias in biases]
        keys = shared_input_linears(memory, weights, added)
        projected = iter(
            [
                Memory(kv, bias, layer.q_weight, layer.q_bias, added[0] is not None)
                for kv, bias, layer in zip(keys, biases, attentions, strict=True)
            ]
        )
        return [next(projected) if read else memory for read in reads]
