"""The oracle in faster plain PyTorch: fused attention, and for bf16 a residual stream in bf16.

Modules of the oracle get another class, with another `forward`; all else stays.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.reference import Attention, Block, DecoderLayer, Encoder, MultiheadAttention, ReferenceLMIM


def fused_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float) -> Tensor:
    """`reference.softmax_attention` by torch's fused attention: q (B, N, D), k and v (B, M, D)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, N, D/H)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


class FusedAttention(Attention):
    """Self-attention on `fused_attention`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(fused_attention(q, k, v, self.heads, 0.0))


class FusedMultiheadAttention(MultiheadAttention):
    """Attention over a memory on `fused_attention`."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, N, D), memory (B, M, D) to (B, N, D)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((x, memory, memory), weights, biases, strict=True))
        return self.out_proj(fused_attention(q, k, v, self.heads, self.dropout if self.training else 0.0))


class HalvingBlock(Block):
    """The first block of an encoder: what follows adds bf16 to bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D) bf16."""
        return super().forward(x.bfloat16())


class HalvingDecoderLayer(DecoderLayer):
    """The first layer of the decoder."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, N, D), memory (B, M, D) to (B, N, D) bf16."""
        return super().forward(x.bfloat16(), memory)


class HalvedLayerNorm(nn.LayerNorm):
    """Statistics in fp32, the result in x's dtype, where autocast would leave it in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return super().forward(x).to(x.dtype)


def fused_model(config: ModelConfig) -> ReferenceLMIM:
    """The oracle with fused attention."""
    model = ReferenceLMIM(config)
    for module in model.modules():
        if type(module) is Attention:
            module.__class__ = FusedAttention
        elif type(module) is MultiheadAttention:
            module.__class__ = FusedMultiheadAttention
    return model


def halve_residual(model: ReferenceLMIM) -> None:
    """Keep the residual streams of encoders and decoder in bf16; for steps under bf16 autocast."""
    for layer in model.decoder_blocks:  # post-norm: the stream is what the norms give
        for name in ("norm1", "norm2", "norm3"):
            getattr(layer, name).__class__ = HalvedLayerNorm
    model.decoder_blocks[0].__class__ = HalvingDecoderLayer
    for encoder in model.modules():
        if isinstance(encoder, Encoder):
            encoder.blocks[0].__class__ = HalvingBlock
