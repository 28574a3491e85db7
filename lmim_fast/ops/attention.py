"""Multi-head attention over packed rows: self-attention from [rows, 3D], cross-attention from [.., 2D]."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmim_fast.ops import attention_backends, attention_plain, attention_reach, dispatch, dropout, routes
from lmim_fast.ops.attention_backends import backend
from lmim_fast.ops.operators import attention as operators
from lmim_fast.ops.operators.operator import differentiable
from lmim_fast.ops.routes import Route

__all__ = ["Segment", "attention_weights", "backend", "cross_attention", "product_bias", "self_attention"]

Segment = tuple[int, int]  # sequences, tokens of each
BIAS_VARIABLE, BIAS_FORMS = "LMIM_FAST_ATTENTION_BIAS", ("load", "product")


def self_attention(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    heads: int,
    segments: Sequence[Segment],
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    causal: bool = False,
    added: bool = False,
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
        causal:   query i of a sequence sees its keys 0..i alone; the kernel then takes up to 64 tokens.
        added:    qkv has its bias, by `linear(..., added=...)`; its gradient still comes out of this op.
    Returns:
        (rows, D) context in qkv's dtype.
    Raises:
        ValueError: shapes, dtypes or devices do not fit, p is outside [0, 1), or the seed is no int64.
        RuntimeError: a backend is asked for by name that cannot run this input.
    Source: Vaswani et al. 2017; dispatch and backends: `backend`.
    """
    segments = tuple([(int(sequences), int(tokens)) for sequences, tokens in segments])
    flat: list[int] = []
    rows, fewest = 0, 1
    for sequences, tokens in segments:
        flat += (sequences, tokens)
        rows += sequences * tokens
        fewest = min(fewest, sequences + 1, tokens)
    if heads < 1 or qkv.dim() != 2 or qkv.shape[0] != rows or qkv.shape[1] % (3 * heads):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} must be ({rows}, 3D) for segments {list(segments)} and {heads} heads"
        )
    if not segments or fewest < 1:
        raise ValueError(f"need segments of at least one token a sequence, got {list(segments)}")
    _check_bias("qkv", qkv, qkv_bias)
    dropout.check(p, seed)
    dispatch.same_device(qkv=qkv, qkv_bias=qkv_bias, seed=seed)
    arguments = (qkv, qkv_bias, heads, segments, p, seed, causal, added)
    chosen = _choose("self_attention", arguments)
    if chosen != "triton":
        return attention_plain.run(attention_plain.self_attention, chosen, arguments)
    seed = dropout.settled_seed(p, seed, qkv.device)
    context: Tensor = operators.self_attention(qkv, qkv_bias, seed, heads, flat, p, causal, added)[0]
    return context


def cross_attention(
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor,
    kv_bias: Tensor | None,
    heads: int,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    key_lengths: Tensor | None = None,
    added: bool = False,
) -> Tensor:
    """Attention of queries over the keys and values of another sequence.

    Args:
        q:       (B, N, D) product of the query linear without its bias, fp64 | fp32 | bf16 | fp16.
        q_bias:  (D,) or None, any float dtype.
        kv:      (B, M, 2D) product of the key and value linears without their bias, keys first; q's dtype.
        kv_bias: (2D,) or None, any float dtype.
        heads:   H, D a multiple of it.
        p, seed: as for `self_attention`.
        key_lengths: (B,) int32 | int64: the queries of a sequence see its first keys, so many; None is all of
                 them. The result does not depend on the others, which may be memory nobody has written; their
                 gradient is zero. The context of a sequence with length 0 is zeros, and so are its gradients;
                 M stands for a length above it, 0 for one below 0. The kernel then takes up to 64 keys.
        added:   as for `self_attention`, of both products.
    Returns:
        (B, N, D) context in q's dtype.
    Raises:
        ValueError: as `self_attention`, or key_lengths is not (B,) int32 or int64.
        RuntimeError: as `self_attention`; "flash" and "cudnn" take no key_lengths.
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
    _check_lengths(len(q), key_lengths)
    dropout.check(p, seed)
    dispatch.same_device(q=q, q_bias=q_bias, kv=kv, kv_bias=kv_bias, seed=seed, key_lengths=key_lengths)
    arguments = (q, q_bias, kv, kv_bias, heads, p, seed, key_lengths, added)
    chosen = _choose("cross_attention", arguments)
    if chosen != "triton":
        return attention_plain.run(attention_plain.cross_attention, chosen, arguments)
    seed = dropout.settled_seed(p, seed, q.device)
    context: Tensor = operators.cross_attention(q, q_bias, kv, kv_bias, seed, heads, p, key_lengths, added)[0]
    return context


def product_bias(bias: Tensor | None) -> Tensor | None:
    """The bias that a linear in front of attention adds, without a gradient; None: attention adds it itself.

    By LMIM_FAST_ATTENTION_BIAS: "load", the default, or "product", in the epilogue of the product.

    Raises:
        ValueError: another value.
    """
    form = os.environ.get(BIAS_VARIABLE, "load")
    if form not in BIAS_FORMS:
        raise ValueError(f"unknown {BIAS_VARIABLE} {form!r}; choose from {', '.join(BIAS_FORMS)}")
    return None if bias is None or form == "load" else bias.detach()


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


def _check_lengths(sequences: int, lengths: Tensor | None) -> None:
    if lengths is not None and (
        lengths.shape != (sequences,) or lengths.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"key_lengths must be ({sequences},) int32 or int64, got {tuple(lengths.shape)} {lengths.dtype}"
        )


def _choose(op: str, arguments: tuple[Any, ...]) -> str | Route:
    """The backend that runs these arguments, by name or by the rule that says so."""
    name = attention_backends.current()
    alone = op == "self_attention"
    p, seed = arguments[4:6] if alone else arguments[5:7]
    seeded = bool(p) and seed is not None
    if seeded and name in ("flash", "cudnn", "sdpa"):
        raise RuntimeError(f"attention backend {name!r} draws its own dropout mask and takes no seed")
    if name not in ("auto", "triton"):
        return name
    tensors = arguments[:2] if alone else arguments[:4]
    reason = (attention_reach.refuses_self if alone else attention_reach.refuses_cross)(*arguments)
    if name == "triton":
        if reason := dispatch.refusal(tensors, reason):
            raise RuntimeError(f"backend 'triton' was asked for, but {op} {reason}")
        return name
    if not dispatch.takes(op, tensors, reason):
        return "eager" if seeded else "sdpa"
    if dispatch.current_backend() != "auto":
        return "triton"
    # A reentrant checkpoint calls without gradients first, then with them: both passes need one dropout mask.
    directions = ("both",) if p or differentiable(*tensors) else ("both", "forward")
    return routes.of_call(op, directions, arguments) or "triton"
