"""Multi-head attention over packed rows: self-attention from [rows, 3D], cross-attention from [.., 2D]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops.dispatch import run

Segment = tuple[int, int]  # sequences, tokens of each


def self_attention(
    qkv: Tensor, qkv_bias: Tensor | None, heads: int, segments: Sequence[Segment], *, p: float = 0.0
) -> Tensor:
    """Self-attention of several groups of sequences that lie in one matrix.

    Args:
        qkv:      (rows, 3D) product of the qkv linear without its bias; rows segment after segment.
        qkv_bias: (3D,) or None.
        heads:    H, D a multiple of it.
        segments: (sequences, tokens) of each group; rows = sum of their products.
        p:        dropout probability of the attention weights, from torch's generator.
    Returns:
        (rows, D) context in qkv's dtype.
    Raises:
        ValueError: shapes do not fit, or p outside [0, 1).
    Source: Vaswani et al. 2017.
    """
    rows = sum(sequences * tokens for sequences, tokens in segments)
    if qkv.dim() != 2 or qkv.shape[0] != rows or qkv.shape[1] % (3 * heads):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} must be ({rows}, 3D) for segments {list(segments)} and {heads} heads"
        )
    _check_probability(p)
    return run("self_attention", _self_attention_eager, qkv, qkv_bias, heads, tuple(segments), p)


def _self_attention_eager(
    qkv: Tensor, qkv_bias: Tensor | None, heads: int, segments: Sequence[Segment], p: float
) -> Tensor:
    if qkv_bias is not None:
        qkv = qkv + qkv_bias.to(qkv.dtype)
    contexts = []
    parts = qkv.split([sequences * tokens for sequences, tokens in segments])
    for part, (sequences, tokens) in zip(parts, segments, strict=True):
        q, k, v = part.view(sequences, tokens, 3, heads, -1).unbind(2)  # (B, N, H, D/H)
        contexts.append(_attend(q, k, v, p).flatten(2).flatten(0, 1))
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def cross_attention(
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor,
    kv_bias: Tensor | None,
    heads: int,
    *,
    p: float = 0.0,
) -> Tensor:
    """Attention of queries over the keys and values of another sequence.

    Args:
        q:       (B, N, D) product of the query linear without its bias.
        q_bias:  (D,) or None.
        kv:      (B, M, 2D) product of the key and value linears without their bias, keys first.
        kv_bias: (2D,) or None.
        heads:   H, D a multiple of it.
        p:       dropout probability of the attention weights, from torch's generator.
    Returns:
        (B, N, D) context in q's dtype.
    Raises:
        ValueError: shapes do not fit, or p outside [0, 1).
    Source: Vaswani et al. 2017.
    """
    if (
        q.dim() != 3
        or kv.dim() != 3
        or q.shape[0] != kv.shape[0]
        or kv.shape[2] != 2 * q.shape[2]
        or q.shape[2] % heads
    ):
        raise ValueError(
            f"q {tuple(q.shape)} and kv {tuple(kv.shape)} must be (B, N, D), (B, M, 2D), {heads} heads"
        )
    _check_probability(p)
    return run("cross_attention", _cross_attention_eager, q, q_bias, kv, kv_bias, heads, p)


def _cross_attention_eager(
    q: Tensor, q_bias: Tensor | None, kv: Tensor, kv_bias: Tensor | None, heads: int, p: float
) -> Tensor:
    if q_bias is not None:
        q = q + q_bias.to(q.dtype)
    if kv_bias is not None:
        kv = kv + kv_bias.to(kv.dtype)
    k, v = kv.unflatten(2, (2, heads, -1)).unbind(2)
    return _attend(q.unflatten(2, (heads, -1)), k, v, p).flatten(2)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """For pictures: softmax(q k^T / sqrt(d)) of q (B, N, H, d) and k (B, M, H, d), (B, H, N, M) fp32."""
    q, k = q.transpose(1, 2).float(), k.transpose(1, 2).float()
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)


def _check_probability(p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")


def _attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """(B, N, H, d), (B, M, H, d) twice to (B, N, H, d)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2)
