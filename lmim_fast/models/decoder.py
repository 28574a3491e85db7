"""LMIM's guided decoder: it computes only what the loss reads, under the released parameter names.

Exact savings: the last layer's queries, FFN and prediction run at masked rows only; masked rows enter as
`mask_token + position` in every image, so their first projection is one table; the linear in front of the
memory and each layer's key and value projections become one linear map if that is cheaper.
Rows are ordered cls, visible, masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.layers.attention import Projections
from lmim_fast.layers.decoder_layer import PackedDecoderLayer


def build_layers(config: ModelConfig) -> nn.ModuleList:
    """The decoder layers of a config."""
    sizes = config.decoder_width, config.decoder_heads, config.decoder_ffn, config.decoder_dropout
    return nn.ModuleList(
        PackedDecoderLayer(*sizes, order=config.decoder_order, epilogue=config.gelu_epilogue)
        for _ in range(config.decoder_depth)
    )


def memory_projection(embed: nn.Linear, layers: Sequence[Projections]) -> tuple[Tensor, Tensor] | None:
    """`embed` followed by all layers' key and value projections as one linear map.

    Returns:
        weight (layers * 2D, encoder width) and bias (layers * 2D,); None if two linears are cheaper.
    """
    width, encoder_width = embed.weight.shape
    folded_cost = encoder_width * 2 * width * len(layers)
    if folded_cost >= encoder_width * width + width * 2 * width * len(layers):
        return None
    weights = torch.cat([layer.kv_weight for layer in layers])
    biases = torch.cat([cast(Tensor, layer.kv_bias) for layer in layers])
    with torch.autocast(embed.weight.device.type, enabled=False):  # rounded once, when the result is used
        return weights @ embed.weight, F.linear(embed.bias, weights, biases)
