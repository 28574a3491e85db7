"""Multi-head attention with timm's and with torch's parameter names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers.inputs import check_heads, tokens
from lmim_fast.ops.attention import Segment, cross_attention, self_attention
from lmim_fast.ops.dropout import check_probability
from lmim_fast.ops.linear import linear


class Attention(nn.Module):
    """timm's vision_transformer.Attention: self-attention, weights `qkv` and `proj`.

    Args:
        dim:       D.
        num_heads: H.
        qkv_bias:  `qkv` has a bias.
        attn_drop: dropout probability of the attention weights, in training mode.
        proj_drop: dropout probability of the result, in training mode.
    Raises:
        ValueError: D is no multiple of H, or a probability is outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        *,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_probability(attn_drop)
        check_probability(proj_drop)
        self.num_heads, self.attn_drop, self.proj_drop = num_heads, attn_drop, proj_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x = tokens("x", x, self.qkv.weight)
        branch = self.forward_packed(linear(x, self.qkv.weight).flatten(0, 1), [(x.shape[0], x.shape[1])])
        return F.dropout(branch + self.proj.bias.to(branch.dtype), self.dropout).view(x.shape)

    def forward_packed(self, qkv: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Result of `qkv` (rows, 3D) to result of `proj` (rows, D), both without bias; no `proj_drop`."""
        p = self.attn_drop if self.training else 0.0
        return linear(self_attention(qkv, self.qkv.bias, self.num_heads, segments, p=p), self.proj.weight)

    @property
    def dropout(self) -> float:
        """Dropout probability of the result: 0 in eval mode."""
        return self.proj_drop if self.training else 0.0


class MultiheadAttention(nn.Module):
    """torch.nn.MultiheadAttention for batch-first input without masks.

    Args:
        embed_dim:     D.
        num_heads:     H.
        dropout:       dropout probability of the attention weights, in training mode.
        bias:          the projections have biases.
        add_bias_kv:   not supported.
        add_zero_attn: not supported.
        kdim:          D or None.
        vdim:          D or None.
        batch_first:   must be set to True; torch's default is False.
        device:        of the parameters.
        dtype:         of the parameters.
    Raises:
        ValueError: D is no multiple of H, or dropout is outside [0, 1).
        NotImplementedError: an option that is not supported.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        check_probability(dropout)
        _refuse("use torch.nn.MultiheadAttention", add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn)
        _refuse(
            f"keys and values must be as wide as queries, {embed_dim}; use torch.nn.MultiheadAttention",
            kdim=None if kdim == embed_dim else kdim,
            vdim=None if vdim == embed_dim else vdim,
        )
        if not batch_first:
            raise NotImplementedError(
                "batch_first=False is not supported: set batch_first=True and pass (B, N, D)"
            )
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = embed_dim, num_heads, dropout, True
        self._qkv_same_embed_dim = True  # read by torch.nn.TransformerEncoderLayer
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, device=device, dtype=dtype))
        self.in_proj_bias = (
            nn.Parameter(torch.zeros(3 * embed_dim, device=device, dtype=dtype)) if bias else None
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attention of the queries over keys and values; one matmul projects all if they are the same tensor.

        Args:
            query: (B, N, D).
            key:   (B, M, D).
            value: (B, M, D).
            key_padding_mask, need_weights, attn_mask, is_causal: as torch's, not supported.
            average_attn_weights: ignored, since no weights are returned.
        Returns:
            (B, N, D), and None instead of the attention weights.
        Raises:
            ValueError: shapes, dtypes or devices do not fit.
            NotImplementedError: a mask is passed, or weights are requested.
        """
        _refuse(
            "leave padding out, or use torch.nn.MultiheadAttention",
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )
        _refuse(
            "lmim_fast.ops.attention.attention_weights computes them for pictures", need_weights=need_weights
        )
        context = self._self(query) if query is key and key is value else self._cross(query, key, value)
        return self.out_proj(context), None

    def _self(self, x: Tensor) -> Tensor:
        x = tokens("query", x, self.in_proj_weight)
        qkv = linear(x, self.in_proj_weight).flatten(0, 1)
        segments = [(x.shape[0], x.shape[1])]
        return self_attention(qkv, self.in_proj_bias, self.num_heads, segments, p=self._p).view(x.shape)

    def _cross(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        inputs = {"query": query, "key": key, "value": value}
        q, k, v = (tokens(name, x, self.in_proj_weight) for name, x in inputs.items())
        if k.shape != v.shape or q.shape[0] != k.shape[0]:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
            raise ValueError(f"need query (B, N, D), key and value (B, M, D), got {shapes}")
        if key is value:
            kv = linear(k, self.kv_weight)
        else:
            kv = torch.cat([linear(x, w) for x, w in zip((k, v), self.kv_weight.chunk(2), strict=True)], -1)
        q = linear(q, self.q_weight)
        return cross_attention(q, self.q_bias, kv, self.kv_bias, self.num_heads, p=self._p)

    @property
    def q_weight(self) -> Tensor:
        """(D, D) rows of in_proj_weight that project the queries."""
        return self.in_proj_weight[: self.embed_dim]

    @property
    def q_bias(self) -> Tensor | None:
        """(D,) part of in_proj_bias for the queries."""
        return None if self.in_proj_bias is None else self.in_proj_bias[: self.embed_dim]

    @property
    def kv_weight(self) -> Tensor:
        """(2D, D) rows of in_proj_weight that project keys and values."""
        return self.in_proj_weight[self.embed_dim :]

    @property
    def kv_bias(self) -> Tensor | None:
        """(2D,) part of in_proj_bias for keys and values."""
        return None if self.in_proj_bias is None else self.in_proj_bias[self.embed_dim :]

    @property
    def _p(self) -> float:
        return self.dropout if self.training else 0.0


def _refuse(advice: str, **options: object) -> None:
    """Raise NotImplementedError for the first option that is set."""
    for name, value in options.items():
        if value is not None and value is not False:
            seen = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"= {value}"
            raise NotImplementedError(f"{name} {seen} is not supported: {advice}")
