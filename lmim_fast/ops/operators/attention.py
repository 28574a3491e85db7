"""Attention by its kernels, or backwards by what a rule of `ops/routes.py` names in their place."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmim_fast import kernels
from lmim_fast.ops import attention_plain, dropout, routes
from lmim_fast.ops.attention_reach import ALL_ON_CHIP
from lmim_fast.ops.operators.operator import cast, operator


def _rows_dense(x: Tensor) -> Tensor:
    """x with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _normalisers(sequences: int, queries: int, keys: int, heads: int) -> int:
    return sequences * heads * queries if keys > ALL_ON_CHIP else 0


def _self_normalisers(heads: int, segments: list[int]) -> int:
    return sum(_normalisers(sequences, tokens, tokens, heads) for sequences, tokens in _pairs(segments))


class _Segment(NamedTuple):
    """Where a segment lies: its sequences (from `first`) and tokens; its normalisers, if it has any."""

    sequences: int
    tokens: int
    first: int
    stored: slice | None


class _Layout(NamedTuple):
    """Segments in turn, the rows of each, all sequences, all normalisers."""

    segments: tuple[_Segment, ...]
    rows: list[int]
    sequences: int
    normalisers: int


@lru_cache(maxsize=256)
def _layout(heads: int, flat: tuple[int, ...]) -> _Layout:
    segments, rows, first, place = [], [], 0, 0
    for sequences, tokens in zip(flat[::2], flat[1::2], strict=True):
        count = _normalisers(sequences, tokens, tokens, heads)
        segments.append(_Segment(sequences, tokens, first, slice(place, place + count) if count else None))
        rows.append(sequences * tokens)
        first, place = first + sequences, place + count
    return _Layout(tuple(segments), rows, first, place)


def _parts(matrix: Tensor, layout: _Layout, *columns: int) -> list[Tensor]:
    """The rows of each segment, (sequences, tokens, *columns)."""
    parts = (matrix,) if len(layout.rows) == 1 else matrix.split_with_sizes(layout.rows)
    return [
        part.view(segment.sequences, segment.tokens, *columns)
        for part, segment in zip(parts, layout.segments, strict=True)
    ]


def _paired(
    qkv: Tensor, heads: int, segments: list[int], threshold: int, causal: bool, *, backward: bool
) -> bool:
    """Whether two segments share a launch."""
    if causal or len(segments) != 4:
        return False
    capability = kernels.runtime.capability(qkv.device)
    multiprocessors = kernels.runtime.multiprocessors(qkv.device)
    return kernels.attention_pair.pairs(
        tuple(segments), heads, qkv.shape[1] // 3 // heads, threshold, capability, multiprocessors,
        backward=backward,
    )  # fmt: skip


def _self_fake(qkv, qkv_bias, seed, heads, segments, p, causal=False, added=False):  # type: ignore[no-untyped-def]
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    return out, qkv.new_empty(_self_normalisers(heads, segments), dtype=torch.float32)


def _self_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, qkv_bias, seed, ctx.heads, ctx.segments, ctx.p, ctx.causal, ctx.added = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, qkv_bias, seed, *output)


def _self_differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    qkv, bias, seed, out, normaliser = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    arguments = (qkv, bias, ctx.heads, _pairs(ctx.segments), ctx.p, seed, ctx.causal, ctx.added)
    if route := routes.of_call("self_attention", ("backward",), arguments):
        found = attention_plain.gradients(route, attention_plain.self_attention, arguments, grad, needed)
        return *found, *(None,) * 6
    wanted = bias is not None and needed[1]
    loaded = None if ctx.added else bias
    d_qkv, d_bias = self_attention_backward(
        grad, qkv, loaded, seed, out, normaliser, ctx.heads, ctx.segments, ctx.p, wanted, ctx.causal
    )
    return d_qkv, cast(d_bias, bias.dtype) if wanted else None, *(None,) * 6


@operator(_self_fake, _self_setup, _self_differentiate)
def self_attention(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    heads: int,
    segments: list[int],
    p: float,
    causal: bool = False,
    added: bool = False,
) -> tuple[Tensor, Tensor]:
    """Context (rows, D) and normalisers, those of all segments with more than ALL_ON_CHIP tokens."""
    qkv_bias = None if added else qkv_bias
    qkv, threshold, layout = _rows_dense(qkv), dropout.threshold(p), _layout(heads, tuple(segments))
    width = qkv.shape[1] // 3
    out = qkv.new_empty(qkv.shape[0], width)
    normaliser = qkv.new_empty(layout.normalisers, dtype=torch.float32)
    v_bias = None if qkv_bias is None else qkv_bias[2 * width :]  # that of q stands first
    if _paired(qkv, heads, segments, threshold, causal, backward=False):
        kept = normaliser if layout.normalisers else None
        kernels.attention_pair.forward_pair(
            qkv, qkv_bias, v_bias, out, kept, heads, tuple(segments), threshold, seed
        )
        return out, normaliser
    views = _parts(qkv, layout, 3, width), _parts(out, layout, width)
    for segment, x, context in zip(layout.segments, *views, strict=True):
        q, k, v = x.unbind(2)
        kernels.attention.forward(
            q, k, v, qkv_bias, v_bias, context, segment.stored and normaliser[segment.stored], heads,
            threshold, seed, segment.first, causal,
        )  # fmt: skip
    return out, normaliser


def _self_backward_fake(  # type: ignore[no-untyped-def]
    grad, qkv, qkv_bias, seed, out, normaliser, heads, segments, p, bias_wanted, causal=False
):
    bias = qkv.new_empty(qkv.shape[1] if bias_wanted else 0, dtype=torch.float32)
    return qkv.new_empty(qkv.shape), bias


@operator(_self_backward_fake)
def self_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    heads: int,
    segments: list[int],
    p: float,
    bias_wanted: bool,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv (rows, 3D) and of its bias, (3D,) fp32 or empty."""
    grad, qkv, out = _rows_dense(grad), _rows_dense(qkv), _rows_dense(out)
    threshold, layout = dropout.threshold(p), _layout(heads, tuple(segments))
    width = out.shape[1]
    d_qkv = qkv.new_empty(qkv.shape)
    sums = qkv.new_empty(2, layout.sequences, width, dtype=torch.float32) if bias_wanted else None
    v_bias = None if qkv_bias is None else qkv_bias[2 * width :]
    if _paired(qkv, heads, segments, threshold, causal, backward=True):
        of_q, of_v = (None, None) if sums is None else sums.unbind()
        kernels.attention_pair.backward_pair(
            qkv, grad, qkv_bias, v_bias, d_qkv, of_q, of_v, heads, tuple(segments), threshold, seed
        )
        return d_qkv, qkv.new_empty(0, dtype=torch.float32) if sums is None else _bias_gradient(sums)
    triples = _parts(qkv, layout, 3, width), _parts(d_qkv, layout, 3, width)
    rows = _parts(grad, layout, width), _parts(out, layout, width)
    for segment, x, d_x, d_out, context in zip(layout.segments, *triples, *rows, strict=True):
        (q, k, v), (d_q, d_k, d_v), first = x.unbind(2), d_x.unbind(2), segment.first
        of_q, of_v = (None, None) if sums is None else (sums[:, first:] if first else sums).unbind()
        kernels.attention_backward.backward(
            q, k, v, d_out, context, segment.stored and normaliser[segment.stored], qkv_bias, v_bias,
            d_q, d_k, d_v, of_q, of_v, heads, threshold, seed, first, causal,
        )  # fmt: skip
    return d_qkv, qkv.new_empty(0, dtype=torch.float32) if sums is None else _bias_gradient(sums)


def _bias_gradient(sums: Tensor) -> Tensor:
    """(3D,) from the sums of q and v of each sequence, (2, S, D); the keys' bias changes nothing."""
    gradient = sums.new_zeros(3, sums.shape[2])
    torch.sum(sums, 1, out=gradient[::2])
    return gradient.view(-1)


def _cross_fake(q, q_bias, kv, kv_bias, seed, heads, p, key_lengths=None, added=False):  # type: ignore[no-untyped-def]
    count = _normalisers(q.shape[0], q.shape[1], kv.shape[1], heads)
    return q.new_empty(q.shape), q.new_empty(count, dtype=torch.float32)


def _cross_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.heads, ctx.p, key_lengths, ctx.added = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, key_lengths)


def _cross_differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    q, q_bias, kv, kv_bias, seed, out, normaliser, key_lengths = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    arguments = (q, q_bias, kv, kv_bias, ctx.heads, ctx.p, seed, key_lengths, ctx.added)
    if route := routes.of_call("cross_attention", ("backward",), arguments):
        found = attention_plain.gradients(route, attention_plain.cross_attention, arguments, grad, needed)
        return *found, *(None,) * 5
    q_bias_wanted, kv_bias_wanted = q_bias is not None and needed[1], kv_bias is not None and needed[3]
    wanted = q_bias_wanted or kv_bias_wanted
    loaded = (None, None) if ctx.added else (q_bias, kv_bias)
    d_q, d_kv, d_bias = cross_attention_backward(
        grad, q, loaded[0], kv, loaded[1], seed, out, normaliser, ctx.heads, ctx.p, wanted, key_lengths
    )
    width = q.shape[2]
    return (
        d_q,
        cast(d_bias[:width], q_bias.dtype) if q_bias_wanted else None,
        d_kv,
        cast(d_bias[width:], kv_bias.dtype) if kv_bias_wanted else None,
        *(None,) * 5,
    )


@operator(_cross_fake, _cross_setup, _cross_differentiate)
def cross_attention(
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor,
    kv_bias: Tensor | None,
    seed: Tensor | None,
    heads: int,
    p: float,
    key_lengths: Tensor | None = None,
    added: bool = False,
) -> tuple[Tensor, Tensor]:
    """Context (B, N, D) and normalisers (B * H * N,), none up to ALL_ON_CHIP keys."""
    q_bias, kv_bias = (None, None) if added else (q_bias, kv_bias)
    q, kv = _rows_dense(q), _rows_dense(kv)
    out = q.new_empty(q.shape)
    count = _normalisers(q.shape[0], q.shape[1], kv.shape[1], heads)
    normaliser = q.new_empty(count, dtype=torch.float32)
    k, v = kv.chunk(2, dim=-1)
    kernels.attention.forward(
        q, k, v, q_bias, None if kv_bias is None else kv_bias[q.shape[2] :], out,
        normaliser if count else None, heads, dropout.threshold(p), seed, 0,
        lengths=None if key_lengths is None else key_lengths.contiguous(),
    )  # fmt: skip
    return out, normaliser


def _cross_backward_fake(  # type: ignore[no-untyped-def]
    grad, q, q_bias, kv, kv_bias, seed, out, normaliser, heads, p, biases_wanted, key_lengths=None
):
    sums = q.new_empty(3 * q.shape[2] if biases_wanted else 0, dtype=torch.float32)
    return q.new_empty(q.shape), kv.new_empty(kv.shape), sums


@operator(_cross_backward_fake)
def cross_attention_backward(
    grad: Tensor,
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor,
    kv_bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    heads: int,
    p: float,
    biases_wanted: bool,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv, and of the biases, (3D,) fp32 or empty."""
    grad, q, kv, out = _rows_dense(grad), _rows_dense(q), _rows_dense(kv), _rows_dense(out)
    d_q, d_kv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    batch, _, width = q.shape
    sums = q.new_empty(2, batch, width, dtype=torch.float32) if biases_wanted else None
    of_q, of_v = (None, None) if sums is None else sums.unbind()
    (k, v), (d_k, d_v) = kv.chunk(2, dim=-1), d_kv.chunk(2, dim=-1)
    kernels.attention_backward.backward(
        q, k, v, grad, out, normaliser if len(normaliser) else None, q_bias,
        None if kv_bias is None else kv_bias[width:], d_q, d_k, d_v, of_q, of_v, heads,
        dropout.threshold(p), seed, 0, lengths=None if key_lengths is None else key_lengths.contiguous(),
    )  # fmt: skip
    return d_q, d_kv, q.new_empty(0, dtype=torch.float32) if sums is None else _bias_gradient(sums)
