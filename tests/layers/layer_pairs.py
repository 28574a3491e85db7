"""Our layers beside the modules whose place they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm_like
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.layers import Attention, Block, DecoderLayer, DropoutAddLayerNorm, Mlp, MultiheadAttention
from lmim_fast.reference import DecoderLayer as ReleasedDecoderLayer

WIDTH, HEADS, HIDDEN = 24, 3, 40
QUERIES, MEMORY = (2, 5, WIDTH), (2, 7, WIDTH)


def timm_attention(**options: object) -> nn.Module:
    return timm_like.Attention(WIDTH, HEADS, **options)


def timm_mlp(**options: object) -> nn.Module:
    return timm_like.Mlp(WIDTH, HIDDEN, **options)


def timm_block(**options: object) -> nn.Module:
    return timm_like.Block(WIDTH, HEADS, 2.5, **options)


class PlainAddNorm(nn.LayerNorm):
    """Dropout, add and LayerNorm one after another."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__(WIDTH, eps=1e-6)
        self.p = p

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + F.dropout(x, self.p, self.training)
        return super().forward(total), total


def our_multihead(**options: object) -> MultiheadAttention:
    return MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)


def torch_attention(**options: object) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)


def torch_decoder(dropout: float = 0.0) -> nn.Module:
    return nn.TransformerDecoderLayer(
        WIDTH, HEADS, HIDDEN, dropout, activation="gelu", layer_norm_eps=1e-6, batch_first=True
    )


def released_decoder(order: str, dropout: float = 0.0) -> nn.Module:
    sizes = dict(decoder_width=WIDTH, decoder_heads=HEADS, decoder_ffn=HIDDEN)
    return ReleasedDecoderLayer(ModelConfig(decoder_dropout=dropout, decoder_order=order, **sizes))


def to_itself(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x, need_weights=False)[0]


def to_memory(module: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
    return module(x, memory, memory, need_weights=False)[0]


def to_keys_and_values(module: nn.Module, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return module(x, key, value, need_weights=False)[0]


@dataclass(frozen=True)
class Pair:
    """A layer, the module it stands for, and how both are called."""

    ours: Callable[[], nn.Module]
    truth: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = (QUERIES,)
    call: Callable[..., Tensor | tuple[Tensor, ...]] = lambda module, *inputs: module(*inputs)

    def make(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
        """Both with the same weights, away from where they start (biases and norms too)."""
        ours, truth = self.ours(), self.truth()
        with torch.no_grad():
            for p in truth.parameters():
                p.add_(0.1 * torch.randn_like(p))
        ours.load_state_dict(truth.state_dict(), strict=True)
        return ours.to(dtype), truth.to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in self.shapes]

    def run(self, module: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = self.call(module, *inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def decoder_pair(order: str) -> Pair:
    return Pair(
        lambda: DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0, order=order),
        lambda: released_decoder(order),
        (QUERIES, MEMORY),
    )


PAIRS = {
    "Attention": Pair(lambda: Attention(WIDTH, HEADS, True), timm_attention),
    "Attention without qkv bias": Pair(
        lambda: Attention(WIDTH, HEADS), lambda: timm_attention(qkv_bias=False)
    ),
    "Mlp": Pair(lambda: Mlp(WIDTH, HIDDEN), timm_mlp),
    "Mlp of rows": Pair(lambda: Mlp(WIDTH, HIDDEN), timm_mlp, ((7, WIDTH),)),
    "Mlp of other sizes": Pair(lambda: Mlp(WIDTH, out_features=9), lambda: timm_like.Mlp(WIDTH, WIDTH, 9)),
    "Block": Pair(lambda: Block(WIDTH, HEADS, 2.5, True), timm_block),
    "Block without qkv bias": Pair(lambda: Block(WIDTH, HEADS, 2.5), lambda: timm_block(qkv_bias=False)),
    "DropoutAddLayerNorm": Pair(lambda: DropoutAddLayerNorm(WIDTH), PlainAddNorm, (QUERIES, QUERIES)),
    "self-attention": Pair(lambda: our_multihead(), torch_attention, call=to_itself),
    "self-attention without bias": Pair(
        lambda: our_multihead(bias=False),
        lambda: torch_attention(bias=False),
        call=to_itself,
    ),
    "cross-attention": Pair(lambda: our_multihead(), torch_attention, (QUERIES, MEMORY), to_memory),
    "cross-attention without bias": Pair(
        lambda: our_multihead(bias=False),
        lambda: torch_attention(bias=False),
        (QUERIES, MEMORY),
        to_memory,
    ),
    "cross-attention with values of their own": Pair(
        lambda: our_multihead(),
        torch_attention,
        (QUERIES, MEMORY, MEMORY),
        to_keys_and_values,
    ),
    "self-attention with values of their own": Pair(
        lambda: our_multihead(),
        torch_attention,
        (QUERIES, QUERIES),
        lambda module, x, value: module(x, x, value, need_weights=False)[0],
    ),
    "DecoderLayer": decoder_pair("sa_ca"),
    "DecoderLayer, memory first": decoder_pair("ca_sa"),
    "torch's decoder layer": Pair(
        lambda: DecoderLayer(WIDTH, HEADS, HIDDEN, 0.0), torch_decoder, (QUERIES, MEMORY)
    ),
}
DROPPING = {
    "attn_drop": Pair(
        lambda: Attention(WIDTH, HEADS, True, attn_drop=0.25), lambda: timm_attention(attn_drop=0.25)
    ),
    "proj_drop": Pair(
        lambda: Attention(WIDTH, HEADS, True, proj_drop=0.25), lambda: timm_attention(proj_drop=0.25)
    ),
    "Mlp": Pair(lambda: Mlp(WIDTH, HIDDEN, drop=0.25), lambda: timm_mlp(drop=0.25)),
    "Block": Pair(
        lambda: Block(WIDTH, HEADS, 2.5, True, proj_drop=0.25, attn_drop=0.5),
        lambda: timm_block(proj_drop=0.25, attn_drop=0.5),
    ),
    "DropoutAddLayerNorm": Pair(
        lambda: DropoutAddLayerNorm(WIDTH, 0.25), lambda: PlainAddNorm(0.25), (QUERIES, QUERIES)
    ),
    "self-attention": Pair(
        lambda: our_multihead(dropout=0.25), lambda: torch_attention(dropout=0.25), call=to_itself
    ),
    "cross-attention": Pair(
        lambda: our_multihead(dropout=0.25),
        lambda: torch_attention(dropout=0.25),
        (QUERIES, MEMORY),
        to_memory,
    ),
    "DecoderLayer": Pair(
        lambda: DecoderLayer(WIDTH, HEADS, HIDDEN, 0.25),
        lambda: released_decoder("sa_ca", 0.25),
        (QUERIES, MEMORY),
    ),
}
