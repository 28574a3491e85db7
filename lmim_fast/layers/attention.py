"""Multi-head attention with timm's and with torch's parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers import plain
from lmim_fast.layers.inputs import check_heads, tokens
from lmim_fast.layers.parts import has_tensors, hooks_on_all, is_biased_linear, is_linear, is_plain
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
        if plain.fits(x, self.qkv._parameters.get("weight")):
            return self.forward_parts(x, None, last=True)
        if not self.reads_weights():
            return self.forward_parts(x, [(x.shape[0], x.shape[1])], last=True)
        x = tokens("x", x, self.qkv.weight)
        branch = self.forward_packed(linear(x, self.qkv.weight).flatten(0, 1), [(x.shape[0], x.shape[1])])
        return F.dropout(branch.view(x.shape) + self.proj.bias.to(branch.dtype), self.dropout)

    def reads_weights(self) -> bool:
        """True if both linears are plain; others are called (`layers/parts.py`)."""
        parts = self._modules  # faster than attributes
        return is_linear(parts["qkv"]) and is_biased_linear(parts["proj"]) and not hooks_on_all()

    def forward_parts(self, x: Tensor, segments: Sequence[Segment] | None, *, last: bool = False) -> Tensor:
        """`forward` by calls of the parts, of x (B, N, D) or of rows (rows, D).

        Args:
            segments: of the flattened rows; None: they are few, and x is (B, N, D).
            last:     as for `plain.linear`.
        """
        p = self.attn_drop if self.training else 0.0
        context = plain.self_attention(plain.linear(x, self.qkv), self.num_heads, segments, p)
        return plain.dropped(plain.linear(context, self.proj, last=last), self.dropout)

    def forward_packed(self, qkv: Tensor, segments: Sequence[Segment], *, added: bool = False) -> Tensor:
        """Result of `qkv` (rows, 3D) to result of `proj` (rows, D), both without bias; no `proj_drop`.

        Args:
            added: the first of them has its bias.
        """
        p = self.attn_drop if self.training else 0.0
        context = self_attention(qkv, self.qkv.bias, self.num_heads, segments, p=p, added=added)
        return linear(context, self.proj.weight)

    @property
    def dropout(self) -> float:
        """Dropout probability of the result: 0 in eval mode."""
        return self.proj_drop if self.training else 0.0


class Projections(NamedTuple):
    """Rows of a `MultiheadAttention`'s input projection."""

    q_weight: Tensor  # (D, D)
    kv_weight: Tensor  # (2D, D)
    q_bias: Tensor | None  # (D,)
    kv_bias: Tensor | None  # (2D,)


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
        return plain.linear(self.context(query, key, value), self.out_proj, last=True), None

    def context(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What `out_proj` reads: (B, N, D) of a query (B, N, D), key and value (B, M, D)."""
        weight, bias = self.in_proj_weight, self.in_proj_bias  # read once: a parametrization makes them
        alone = query is key and key is value
        few = key is value and plain.fits(query, weight)
        if few and alone:
            return plain.attend_self(query, weight, bias, self.num_heads, self.attn_drop)
        if few and plain.fits(key, weight) and len(query) == len(key):
            return plain.attend_memory(query, key, weight, bias, self.num_heads, self.attn_drop)
        if alone:
            return self._self(query, weight, bias)
        return self._cross(query, key, value, self._split(weight, bias))

    def _self(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = tokens("query", x, weight)
        qkv = linear(x, weight).flatten(0, 1)
        segments = [(x.shape[0], x.shape[1])]
        return self_attention(qkv, bias, self.num_heads, segments, p=self.attn_drop).view(x.shape)

    def _cross(self, query: Tensor, key: Tensor, value: Tensor, projections: Projections) -> Tensor:
        q_weight, kv_weight, q_bias, kv_bias = projections
        inputs = {"query": query, "key": key, "value": value}
        q, k, v = (tokens(name, x, q_weight) for name, x in inputs.items())
        if k.shape != v.shape or q.shape[0] != k.shape[0]:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
            raise ValueError(f"need query (B, N, D), key and value (B, M, D), got {shapes}")
        if key is value:
            kv = linear(k, kv_weight)
        else:
            kv = torch.cat([linear(x, w) for x, w in zip((k, v), kv_weight.chunk(2), strict=True)], -1)
        return cross_attention(linear(q, q_weight), q_bias, kv, kv_bias, self.num_heads, p=self.attn_drop)

    def projections(self) -> Projections:
        """The two parts of the input projection, whose gradients are put together once."""
        return self._split(self.in_proj_weight, self.in_proj_bias)

    def _split(self, weight: Tensor, bias: Tensor | None) -> Projections:
        sizes = [self.embed_dim, 2 * self.embed_dim]
        return Projections(*weight.split(sizes), *((None, None) if bias is None else bias.split(sizes)))

    @property
    def attn_drop(self) -> float:
        """Dropout probability of the attention weights: 0 in eval mode."""
        return self.dropout if self.training else 0.0


def reads_weights(attention: Any) -> bool:
    """True for a plain `MultiheadAttention` with biases: a layer that holds it reads its weights."""
    return (
        is_plain(attention, MultiheadAttention)
        and has_tensors(attention, "in_proj_weight", "in_proj_bias")
        and attention._parameters["in_proj_bias"] is not None
        and is_biased_linear(attention._modules["out_proj"])
    )


def _refuse(advice: str, **options: object) -> None:
    """Raise NotImplementedError for the first option that is set."""
    for name, value in options.items():
        if value is not None and value is not False:
            seen = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"= {value}"
            raise NotImplementedError(f"{name} {seen} is not supported: {advice}")
