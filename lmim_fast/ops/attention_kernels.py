"""The attention kernels as PyTorch operators: fake forms and autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmim_fast.ops import attention_plain, attention_reach, dispatch, dropout, routes
from lmim_fast.ops.attention_reach import ALL_ON_CHIP


def self_attention(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    heads: int,
    segments: tuple[tuple[int, int], ...],
    p: float,
    seed: Tensor | None,
    causal: bool,
) -> Tensor:
    """`ops.attention.self_attention` by the kernel."""
    if p and seed is None:
        seed = dropout.draw_seed(qkv.device)
    flat = [value for segment in segments for value in segment]
    context: Tensor = _self(qkv, qkv_bias, seed, heads, flat, p, causal)[0]
    return context


def cross_attention(
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor,
    kv_bias: Tensor | None,
    heads: int,
    p: float,
    seed: Tensor | None,
    key_lengths: Tensor | None,
) -> Tensor:
    """`ops.attention.cross_attention` by the kernel."""
    if p and seed is None:
        seed = dropout.draw_seed(q.device)
    context: Tensor = _cross(q, q_bias, kv, kv_bias, seed, heads, p, key_lengths)[0]
    return context


def _rows_dense(x: Tensor) -> Tensor:
    """x with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.contiguous()


def _pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _normalisers(sequences: int, queries: int, keys: int, heads: int) -> int:
    return sequences * heads * queries if keys > ALL_ON_CHIP else 0


@torch.library.custom_op("lmim_fast::self_attention", mutates_args=())
def _self(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    heads: int,
    segments: list[int],
    p: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Context (rows, D) and normalisers, those of all segments with more than ALL_ON_CHIP tokens."""
    from lmim_fast.kernels import attention

    qkv = _rows_dense(qkv)
    width = qkv.shape[1] // 3
    out = qkv.new_empty(qkv.shape[0], width)
    normaliser = qkv.new_empty(_self_normalisers(heads, segments), dtype=torch.float32)
    q_bias, _, v_bias = (None, None, None) if qkv_bias is None else qkv_bias.chunk(3)
    for part in _segments(segments, heads, qkv, out, normaliser):
        (x, context), stored, first = part
        q, k, v = x.chunk(3, dim=-1)
        attention.forward(
            q, k, v, q_bias, v_bias, context, stored, heads, dropout.threshold(p), seed, first, causal
        )  # fmt: skip
    return out, normaliser


def _self_normalisers(heads: int, segments: list[int]) -> int:
    return sum(_normalisers(sequences, tokens, tokens, heads) for sequences, tokens in _pairs(segments))


def _segments(
    segments: list[int], heads: int, *tensors: Tensor
) -> list[tuple[list[Tensor], Tensor | None, int]]:
    """For each segment: its rows of each matrix as (S, N, ..), its normalisers (last), its first sequence."""
    *matrices, normaliser = tensors
    parts: list[tuple[list[Tensor], Tensor | None, int]] = []
    row = first = place = 0
    for sequences, tokens in _pairs(segments):
        rows = sequences * tokens
        count = _normalisers(sequences, tokens, tokens, heads)
        views = [matrix[row : row + rows].unflatten(0, (sequences, tokens)) for matrix in matrices]
        parts.append((views, normaliser[place : place + count] if count else None, first))
        row, first, place = row + rows, first + sequences, place + count
    return parts


@_self.register_fake
def _(qkv, qkv_bias, seed, heads, segments, p, causal=False):  # type: ignore[no-untyped-def]
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    return out, qkv.new_empty(_self_normalisers(heads, segments), dtype=torch.float32)


@torch.library.custom_op("lmim_fast::self_attention_backward", mutates_args=())
def _self_backward(
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
    from lmim_fast.kernels import attention_backward

    grad, qkv, out = _rows_dense(grad), _rows_dense(qkv), _rows_dense(out)
    width = out.shape[1]
    d_qkv = qkv.new_empty(qkv.shape)
    sequences = sum(segments[::2])
    sums = qkv.new_empty(2, sequences, width, dtype=torch.float32) if bias_wanted else None
    q_bias, _, v_bias = (None, None, None) if qkv_bias is None else qkv_bias.chunk(3)
    views = _segments(segments, heads, qkv, grad, out, d_qkv, normaliser)
    for (x, d_out, context, d_x), stored, first in views:
        of_q, of_v = (None, None) if sums is None else sums[:, first : first + len(x)]
        (q, k, v), (d_q, d_k, d_v) = x.chunk(3, dim=-1), d_x.chunk(3, dim=-1)
        attention_backward.backward(
            q, k, v, d_out, context, stored, q_bias, v_bias, d_q, d_k, d_v, of_q, of_v,
            heads, dropout.threshold(p), seed, first, causal,
        )  # fmt: skip
    if sums is None:
        return d_qkv, qkv.new_empty(0, dtype=torch.float32)
    q_sum, v_sum = sums.sum(1)
    return d_qkv, torch.cat([q_sum, torch.zeros_like(q_sum), v_sum])  # the keys' bias changes nothing


@_self_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, qkv, qkv_bias, seed, out, normaliser, heads, segments, p, bias_wanted, causal=False
):
    bias = qkv.new_empty(qkv.shape[1] if bias_wanted else 0, dtype=torch.float32)
    return qkv.new_empty(qkv.shape), bias


def _self_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, qkv_bias, seed, ctx.heads, ctx.segments, ctx.p, ctx.causal = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, qkv_bias, seed, *output)


def _self_autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    qkv, bias, seed, out, normaliser = ctx.saved_tensors
    arguments = (qkv, bias, ctx.heads, _pairs(ctx.segments), ctx.p, seed, ctx.causal)
    if route := routes.of_call("self_attention", ("backward",), arguments):
        needed = ctx.needs_input_grad[:2]
        found = attention_plain.gradients(route, attention_plain.self_attention, arguments, grad, needed)
        return *found, *(None,) * 5
    wanted = bias is not None and ctx.needs_input_grad[1]
    d_qkv, d_bias = _self_backward(
        grad, qkv, bias, seed, out, normaliser, ctx.heads, ctx.segments, ctx.p, wanted, ctx.causal
    )
    return d_qkv, d_bias.to(bias.dtype) if wanted else None, *(None,) * 5


_self.register_autograd(_self_autograd, setup_context=_self_context)


@torch.library.custom_op("lmim_fast::cross_attention", mutates_args=())
def _cross(
    q: Tensor,
    q_bias: Tensor | None,
    kv: Tensor,
    kv_bias: Tensor | None,
    seed: Tensor | None,
    heads: int,
    p: float,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Context (B, N, D) and normalisers (B * H * N,), none up to ALL_ON_CHIP keys."""
    from lmim_fast.kernels import attention

    q, kv = _rows_dense(q), _rows_dense(kv)
    out = q.new_empty(q.shape)
    normaliser = q.new_empty(_normalisers(q.shape[0], q.shape[1], kv.shape[1], heads), dtype=torch.float32)
    k, v = kv.chunk(2, dim=-1)
    v_bias = None if kv_bias is None else kv_bias.chunk(2)[1]
    stored = normaliser if len(normaliser) else None
    attention.forward(
        q, k, v, q_bias, v_bias, out, stored, heads, dropout.threshold(p), seed, 0,
        lengths=_dense(key_lengths),
    )  # fmt: skip
    return out, normaliser


@_cross.register_fake
def _(q, q_bias, kv, kv_bias, seed, heads, p, key_lengths=None):  # type: ignore[no-untyped-def]
    count = _normalisers(q.shape[0], q.shape[1], kv.shape[1], heads)
    return q.new_empty(q.shape), q.new_empty(count, dtype=torch.float32)


@torch.library.custom_op("lmim_fast::cross_attention_backward", mutates_args=())
def _cross_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, kv, and of the biases, (D,) and (2D,) fp32 or empty."""
    from lmim_fast.kernels import attention_backward

    grad, q, kv, out = (_rows_dense(x) for x in (grad, q, kv, out))
    d_q, d_kv = q.new_empty(q.shape), kv.new_empty(kv.shape)
    sums = q.new_empty(2, q.shape[0], q.shape[2], dtype=torch.float32) if biases_wanted else None
    v_bias = None if kv_bias is None else kv_bias.chunk(2)[1]
    (k, v), (d_k, d_v) = kv.chunk(2, dim=-1), d_kv.chunk(2, dim=-1)
    of_q, of_v = (None, None) if sums is None else sums
    attention_backward.backward(
        q, k, v, grad, out, normaliser if len(normaliser) else None, q_bias, v_bias, d_q, d_k, d_v,
        of_q, of_v, heads, dropout.threshold(p), seed, 0, lengths=_dense(key_lengths),
    )  # fmt: skip
    if sums is None:
        none = partial(q.new_empty, 0, dtype=torch.float32)
        return d_q, d_kv, none(), none()
    q_sum, v_sum = sums.sum(1)
    return d_q, d_kv, q_sum.clone(), torch.cat([torch.zeros_like(v_sum), v_sum])


@_cross_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad, q, q_bias, kv, kv_bias, seed, out, normaliser, heads, p, biases_wanted, key_lengths=None
):
    width = q.shape[2] if biases_wanted else 0
    sums = [q.new_empty(count * width, dtype=torch.float32) for count in (1, 2)]
    return q.new_empty(q.shape), kv.new_empty(kv.shape), *sums


def _cross_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.heads, ctx.p, key_lengths = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, key_lengths)


def _cross_autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    q, q_bias, kv, kv_bias, seed, out, normaliser, key_lengths = ctx.saved_tensors
    arguments = (q, q_bias, kv, kv_bias, ctx.heads, ctx.p, seed, key_lengths)
    if route := routes.of_call("cross_attention", ("backward",), arguments):
        needed = ctx.needs_input_grad[:4]
        found = attention_plain.gradients(route, attention_plain.cross_attention, arguments, grad, needed)
        return *found, *(None,) * 4
    wanted = [bias is not None and ctx.needs_input_grad[i] for bias, i in ((q_bias, 1), (kv_bias, 3))]
    d_q, d_kv, d_q_bias, d_kv_bias = _cross_backward(
        grad, q, q_bias, kv, kv_bias, seed, out, normaliser, ctx.heads, ctx.p, any(wanted), key_lengths
    )
    return (
        d_q,
        d_q_bias.to(q_bias.dtype) if wanted[0] else None,
        d_kv,
        d_kv_bias.to(kv_bias.dtype) if wanted[1] else None,
        *(None,) * 4,
    )


_cross.register_autograd(_cross_autograd, setup_context=_cross_context)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dispatch.register("self_attention", dispatch.Kernel(self_attention, _DTYPES, attention_reach.refuses_self))
dispatch.register("cross_attention", dispatch.Kernel(cross_attention, _DTYPES, attention_reach.refuses_cross))
