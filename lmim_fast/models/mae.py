"""MAE pre-training on the fast ops: the stage that makes LMIM's teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.layers.norm import LAYER_NORM_EPS
from lmim_fast.layers.plain import product_and_bias
from lmim_fast.models.encoder import Encoder, build_blocks, initialise, position_table, run_blocks
from lmim_fast.models.objective import PretrainOutput, Target, choose_patches
from lmim_fast.ops.tokens import decoder_tokens


class MAE(Encoder):
    """Encoder of the visible patches and a ViT decoder that predicts normalised pixels.

    Encoder names have no prefix, decoder names begin with `decoder`, as in MAERec's files.
    Source: MAE (arXiv 2111.06377) as used by MAERec.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config
        self.num_patches = config.num_patches
        self.num_visible = config.mae_num_visible
        width = config.decoder_width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(position_table(width, config), requires_grad=False)
        self.decoder_embed = nn.Linear(config.width, width)
        self.decoder_blocks = build_blocks(config.mae_decoder_depth, width, config.decoder_heads, config)
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(width, config.patch_pixels)
        self.apply(initialise)

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        *,
        patches: tuple[Tensor, Tensor] | None = None,
    ) -> PretrainOutput:
        """Losses of a batch; loss_align is 0.

        Args:
            images:  float (B, 3, height, width) in [-1, 1] or uint8 (B, height, width, 3).
            noise:   (B, L) that ranks the patches for masking; None draws it.
            patches: ids of the visible (B, K) and of the masked patches (B, L - K), both rising, instead of
                     noise.
        Raises:
            ValueError: an image of another layout or size, or patches of another number.
        """
        ids_visible, ids_masked = choose_patches(images, noise, patches, self.num_patches, self.num_visible)
        latent = self.encode(images, ids_visible)
        product, bias = self.decode(latent, ids_visible, ids_masked)
        target = Target(images, None, self.config.patch_size, normalise=True)
        loss = target.loss(product, bias, ids_masked)
        zero = loss.new_zeros(())
        return PretrainOutput(loss, loss, zero, latent, None, ids_visible, ids_masked, product, bias, target)

    def decode(self, latent: Tensor, ids_visible: Tensor, ids_masked: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted pixels (B, M, P) of the masked patches from latent (B, 1 + K, D), and their bias (P,).

        The bias is still to be added; it is zero if the product has it already.
        """
        visible, bias = product_and_bias(latent, self.decoder_embed)
        tokens = decoder_tokens(
            *(visible, bias, self.mask_token, self.decoder_pos_embed, ids_visible, ids_masked),
            dtype=self.residual_dtype(),
        )
        segments = [(tokens.shape[0], tokens.shape[1])]
        dtype = self.compute_dtype()
        rows = run_blocks(self.decoder_blocks, self.decoder_norm, tokens.flatten(0, 1), segments, dtype)
        return product_and_bias(rows.view_as(tokens)[:, visible.shape[1] :], self.decoder_pred)
