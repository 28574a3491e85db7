"""LMIM's guided decoder, computing only what the loss reads; released parameter names.

Exact savings: the last layer's queries, FFN and prediction run at masked rows only; masked rows enter as
`mask_token + position` for every image, so the first projection of them is one table; the linear in front of
the memory and each layer's key and value projections are one linear map, where that is cheaper.
Rows are ordered cls, visible, masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.config import ModelConfig
from lmim_fast.models.encoder import LAYER_NORM_EPS
from lmim_fast.ops.attention import cross_attention, self_attention
from lmim_fast.ops.gelu import bias_gelu
from lmim_fast.ops.linear import linear, linear_recomputing
from lmim_fast.ops.norm import dropout_add_layer_norm
from lmim_fast.ops.tokens import gather_table


class MultiheadAttention(nn.Module):
    """Holds attention weights under torch's names; q, k, v blocks of in_proj are used apart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)


class MaskedRows:
    """Rows whose masked part is `table[ids]`: projections of that part are made once for all images."""

    def __init__(self, rows: Tensor, table: Tensor, ids_masked: Tensor) -> None:
        self.rows, self.table, self.ids = rows, table, ids_masked
        self.num_shown = rows.shape[1] - ids_masked.shape[1]

    def project(self, weight: Tensor, *, masked_only: bool = False) -> Tensor:
        """All rows, or the masked ones, times weight.T."""
        masked = gather_table(linear(self.table, weight), self.ids)
        if masked_only:
            return masked
        return torch.cat([linear(self.rows[:, : self.num_shown], weight), masked], dim=1)


class PlainRows:
    """Rows with nothing known about them; the same interface as `MaskedRows`."""

    def __init__(self, rows: Tensor, num_shown: int) -> None:
        self.rows, self.num_shown = rows, num_shown

    def project(self, weight: Tensor, *, masked_only: bool = False) -> Tensor:
        """All rows, or the masked ones, times weight.T."""
        return linear(self.rows[:, self.num_shown :] if masked_only else self.rows, weight)


class DecoderLayer(nn.Module):
    """Post-norm self-attention, cross-attention, FFN (or cross-attention first)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.heads, self.p, self.order = config.decoder_heads, config.decoder_dropout, config.decoder_order
        self.self_attn = MultiheadAttention(width)
        self.multihead_attn = MultiheadAttention(width)
        self.linear1 = nn.Linear(width, config.decoder_ffn)
        self.linear2 = nn.Linear(config.decoder_ffn, width)
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)  # after self-attention
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)  # after cross-attention
        self.norm3 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)  # after the FFN

    def forward(self, x: MaskedRows | PlainRows, kv: Tensor, kv_bias: Tensor, *, masked_only: bool) -> Tensor:
        """One layer.

        Args:
            x:           rows (B, N, D): cls, visible, masked.
            kv:          (B, M, 2D) keys and values of the memory, without bias.
            kv_bias:     (2D,).
            masked_only: give back only the masked rows (the last layer).
        Returns:
            (B, N, D), or (B, masked, D).
        """
        rows: Tensor = x.rows
        if self.order == "sa_ca":
            rows = self.attend_self(x, masked_only)
            rows = self.attend_memory(PlainRows(rows, 0), kv, kv_bias)
        else:
            rows = self.attend_memory(x, kv, kv_bias)
            rows = self.attend_self(PlainRows(rows, x.num_shown), masked_only)
        return self.feed_forward(rows)

    def attend_self(self, x: MaskedRows | PlainRows, masked_only: bool) -> Tensor:
        """Self-attention, residual add and norm1; queries at masked rows only when asked."""
        attention, p = self.self_attn, self.dropout
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        if masked_only:
            width = weight.shape[1]
            q, kv = x.project(weight[:width], masked_only=True), x.project(weight[width:])
            context = cross_attention(q, bias[:width], kv, bias[width:], self.heads, p=p)
            residual = x.rows[:, x.num_shown :]
        else:
            residual = x.rows
            qkv = x.project(weight)
            context = self_attention(qkv.flatten(0, 1), bias, self.heads, [(qkv.shape[0], qkv.shape[1])], p=p)
            context = context.view_as(residual)
        product = linear(context, attention.out_proj.weight)
        return self.add_norm(product, attention.out_proj.bias, residual, self.norm1)

    def attend_memory(self, x: MaskedRows | PlainRows, kv: Tensor, kv_bias: Tensor) -> Tensor:
        """Cross-attention over the memory, residual add and norm2."""
        attention, width = self.multihead_attn, x.rows.shape[2]
        q = x.project(attention.in_proj_weight[:width])
        context = cross_attention(q, attention.in_proj_bias[:width], kv, kv_bias, self.heads, p=self.dropout)
        product = linear(context, attention.out_proj.weight)
        return self.add_norm(product, attention.out_proj.bias, x.rows, self.norm2)

    def feed_forward(self, rows: Tensor) -> Tensor:
        """FFN, residual add and norm3."""
        hidden = linear(rows, self.linear1.weight)
        activated = bias_gelu(hidden, self.linear1.bias, p=self.dropout)
        if self.dropout:
            product = linear(activated, self.linear2.weight)
        else:
            product = linear_recomputing(activated, self.linear2.weight, bias_gelu, hidden, self.linear1.bias)
        return self.add_norm(product, self.linear2.bias, rows, self.norm3)

    def add_norm(self, product: Tensor, bias: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        """norm(residual + dropout(product + bias)) in the product's dtype."""
        return dropout_add_layer_norm(
            product, bias, residual, norm.weight, norm.bias, p=self.dropout, eps=norm.eps
        )[0]

    @property
    def dropout(self) -> float:
        """Dropout in force: 0 in eval mode."""
        return self.p if self.training else 0.0


def memory_projection(embed: nn.Linear, layers: Sequence[MultiheadAttention]) -> tuple[Tensor, Tensor] | None:
    """`embed` followed by all layers' key and value projections as one linear map.

    Returns:
        weight (layers * 2D, encoder width) and bias (layers * 2D,); None where two linears are cheaper.
    """
    width, encoder_width = embed.weight.shape
    folded_cost = encoder_width * 2 * width * len(layers)
    if folded_cost >= encoder_width * width + width * 2 * width * len(layers):
        return None
    weights = torch.cat([layer.in_proj_weight[width:] for layer in layers])
    biases = torch.cat([layer.in_proj_bias[width:] for layer in layers])
    with torch.autocast(embed.weight.device.type, enabled=False):  # a product of weights is rounded only once
        return weights @ embed.weight, F.linear(embed.bias, weights, biases)
