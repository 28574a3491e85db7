"""Multi-head attention over packed rows: self-attention from [rows, 3D], cross-attention from [.., 2D]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.ops import attention_backends, attention_kernels, dispatch, dropout
from lmim_fast.ops.attention_backends import backend
from lmim_fast.ops.attention_heads import split_heads
from lmim_fast.ops.attention_table import FASTER

__all__ = ["Segment", "attention_weights", "backend", "cross_attention", "self_attention"]

Segment = tuple[int, int]  # sequences, tokens of each


def self_attention(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    heads: int,
    segments: Sequence[Segment],
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Self-attention of several groups of sequences that lie in one matrix.

    Args:
        qkv:      (rows, 3D) product of the qkv linear without its bias, fp64 | fp32 | bf16 | fp16; rows
                  segment after segment.
        qkv_bias: (3D,) or None, any float dtype; its gradient comes out of this op.
        heads:    H, D a multiple of it.
        segments: (sequences, tokens) of each group, tokens >= 1; rows = sum of their products.
        p:        dropout probability of the attention weights, in [0, 1); in steps of 1/256 where a seed is
                  given or the kernel runs (`ops/dropout.py`).
        seed:     one int64: the dropout mask is a function of it; None draws from torch's generator.
    Returns:
        (rows, D) context in qkv's dtype.
    Raises:
        ValueError: shapes, dtypes or devices do not fit, p is outside [0, 1), or the seed is no int64.
        RuntimeError: a backend is asked for by name that cannot run this input.
    Source: Vaswani et al. 2017; dispatch and backends: `backend`.
    """
    segments = tuple((int(sequences), int(tokens)) for sequences, tokens in segments)
    rows = sum(sequences * tokens for sequences, tokens in segments)
    if heads < 1 or qkv.dim() != 2 or qkv.shape[0] != rows or qkv.shape[1] % (3 * heads):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} must be ({rows}, 3D) for segments {list(segments)} and {heads} heads"
        )
    if not segments or any(sequences < 0 or tokens < 1 for sequences, tokens in segments):
        raise ValueError(f"need segments of at least one token a sequence, got {list(segments)}")
    _check_bias("qkv", qkv, qkv_bias)
    _check_rest(p, seed, qkv=qkv, qkv_bias=qkv_bias, seed=seed)
    arguments = (qkv, qkv_bias, heads, segments, p, seed)
    name = _choose("self_attention", arguments)
    if name == "triton":
        return attention_kernels.self_attention(*arguments)
    if qkv_bias is not None:
        qkv_bias = qkv_bias.to(qkv.dtype)
    contexts, first = [], 0
    for q, k, v in split_heads(qkv, qkv_bias, heads, segments):
        contexts.append(_attend(name, q, k, v, p, seed, first).flatten(2).flatten(0, 1))
        first += len(q)
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def cross_attention(
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor,
    kv_bias: Tensor | None,
    heads: int,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention of queries over the keys and values of another sequence.

    Args:
        q:       (B, N, D) product of the query linear without its bias, fp64 | fp32 | bf16 | fp16.
        q_bias:  (D,) or None, any float dtype.
        kv:      (B, M, 2D) product of the key and value linears without their bias, keys first; q's dtype.
        kv_bias: (2D,) or None, any float dtype.
        heads:   H, D a multiple of it.
        p, seed: as for `self_attention`.
    Returns:
        (B, N, D) context in q's dtype.
    Raises:
        ValueError: as `self_attention`.
        RuntimeError: as `self_attention`.
    Source: Vaswani et al. 2017.
    """
    if (
        heads < 1
        or q.dim() != 3
        or kv.dim() != 3
        or q.shape[0] != kv.shape[0]
        or kv.shape[2] != 2 * q.shape[2]
        or q.shape[2] % heads
    ):
        raise ValueError(
            f"q {tuple(q.shape)} and kv {tuple(kv.shape)} must be (B, N, D), (B, M, 2D), {heads} heads"
        )
    if 0 in (q.shape[1], kv.shape[1]):
        raise ValueError(f"q {tuple(q.shape)} and kv {tuple(kv.shape)} must have at least one token")
    if q.dtype != kv.dtype:
        raise ValueError(f"q and kv must have one dtype, got {q.dtype} and {kv.dtype}")
    _check_bias("q", q, q_bias)
    _check_bias("kv", kv, kv_bias)
    _check_rest(p, seed, q=q, q_bias=q_bias, kv=kv, kv_bias=kv_bias, seed=seed)
    arguments = (q, q_bias, kv, kv_bias, heads, p, seed)
    name = _choose("cross_attention", arguments)
    if name == "triton":
        return attention_kernels.cross_attention(*arguments)
    if q_bias is not None:
        q = q + q_bias.to(q.dtype)
    if kv_bias is not None:
        kv = kv + kv_bias.to(kv.dtype)
    k, v = kv.unflatten(2, (2, heads, -1)).unbind(2)
    return _attend(name, q.unflatten(2, (heads, -1)), k, v, p, seed, 0).flatten(2)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """For pictures: softmax(q k^T / sqrt(d)) of q (B, N, H, d) and k (B, M, H, d), (B, H, N, M) fp32."""
    q, k = q.transpose(1, 2).float(), k.transpose(1, 2).float()
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)


def _check_bias(name: str, product: Tensor, bias: Tensor | None) -> None:
    if not product.is_floating_point():
        raise ValueError(f"{name} must be floating-point, got {product.dtype}")
    if bias is not None and (bias.shape != product.shape[-1:] or not bias.is_floating_point()):
        raise ValueError(
            f"{name}_bias must be ({product.shape[-1]},) and floating-point for {name} "
            f"{tuple(product.shape)}, got {tuple(bias.shape)} {bias.dtype}"
        )


def _check_rest(p: float, seed_value: Tensor | None, **tensors: Tensor | None) -> None:
    dropout.check_probability(p)
    dropout.check_seed(seed_value)
    dispatch.same_device(**tensors)


def _choose(op: str, arguments: tuple[Any, ...]) -> str:
    """Name of the backend that runs these arguments."""
    name = attention_backends.current()
    if name == "triton":
        dispatch.select(op, *arguments, backend="triton")  # raises where the kernel does not fit
    p, seed = arguments[-2:]
    seeded = bool(p) and seed is not None
    if seeded and name in ("flash", "cudnn", "sdpa"):
        raise RuntimeError(f"attention backend {name!r} draws its own dropout mask and takes no seed")
    if name != "auto":
        return name
    if dispatch.select(op, *arguments) is None:
        return "eager" if seeded else "sdpa"
    return (_faster(op, arguments) if FASTER and not p else None) or "triton"


def _faster(op: str, arguments: tuple[Any, ...]) -> str | None:
    """The backend that was measured to be faster than the kernel, or None; with gradients none is."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    x = tensors[0]
    casts = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != x.dtype
    if casts or dispatch.current_backend() != "auto":
        return None
    if op == "self_attention":
        heads, segments = arguments[2:4]
        if len(segments) > 1:
            return None
        width, queries = x.shape[1] // 3, segments[0][1]
        keys = queries
    else:
        kv, heads = arguments[2], arguments[4]
        width, queries, keys = x.shape[2], x.shape[1], kv.shape[1]
    return FASTER.get((op, runtime.capability(x.device), width // heads, queries, keys))


def _attend(
    name: str, q: Tensor, k: Tensor, v: Tensor, p: float, seed: Tensor | None, first_sequence: int
) -> Tensor:
    """(B, N, H, d), (B, M, H, d) twice to (B, N, H, d) on a backend other than the kernel."""
    if not p or seed is None:
        return attention_backends.PLAIN[name](q, k, v, p)
    sequences, rows, heads, _ = q.shape
    masks = first_sequence * heads + torch.arange(sequences * heads, device=q.device)
    keep = dropout.keep_mask(seed, masks, rows, k.shape[1], p).view(sequences, heads, rows, k.shape[1])
    return attention_backends.eager(q, k, v, p, keep)
