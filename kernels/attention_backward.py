"""Attention backward for short sequences: one program is one head of one sequence, five products a block.

The gradients of keys and values stay in registers while the program walks over blocks of queries: no atomics,
and the probabilities are made once. Keys are rows of each tile, queries its columns. Up to 64 keys nothing
but the inputs is kept from the forward pass. Beyond, a first walk over the queries writes what their score
gradients subtract (delta = context x its gradient) and does all of the one key that may stand apart, so that
the second needs no reduction over the keys. Many keys are taken in chunks, one after the other, so that the
products of one need no registers while those of another run.

The key bias has no gradient: it shifts all scores of a query alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.kernels.attention import geometry, hides_trips, tile
from lmim_fast.kernels.attention_tiles import (
    LOG2E,
    factor,
    hide,
    load_keys,
    load_row,
    load_tile,
    seen_keys,
    store_tile,
)
from lmim_fast.kernels.dropout import keep_column, keep_tile_transposed


@triton.jit
def _queries(
    q_ptr, q_bias_ptr, rows, stride_q: tl.constexpr, whole: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Queries with their bias, (R, D) in their own type."""
    q = load_tile(q_ptr, rows, stride_q, N, whole, D)
    if q_bias_ptr is not None:
        q = (q.to(tl.float32) + load_row(q_bias_ptr, D)[None, :]).to(q.dtype)
    return q


@triton.constexpr_function
def transposes_dq(dim: int, rows: int) -> bool:
    """Queries are columns of the product that makes dq: few fill the rows of a tensor core product badly."""
    return dim >= 64 and rows < 64


@triton.jit
def _prepare_rows(
    q_ptr, do_ptr, out_ptr, normaliser_ptr, delta_ptr, k_tail_ptr, v_tail_ptr, dk_tail, dv_tail, q_bias_ptr,
    v_bias_ptr, seed_ptr, sequence, start, stride_q: tl.constexpr, stride_do: tl.constexpr,
    stride_out: tl.constexpr, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, threshold: tl.constexpr,
):  # fmt: skip
    """Write delta of ROWS queries and the score gradients of a key apart; add to that key's gradients."""
    rows = start + tl.arange(0, ROWS)
    do = load_tile(do_ptr, rows, stride_do, N, N % ROWS == 0, D).to(tl.float32)
    out = load_tile(out_ptr, rows, stride_out, N, N % ROWS == 0, D).to(tl.float32)
    v_bias = load_row(v_bias_ptr, D)[None, :]
    if threshold == 0:  # d_p leaves out the bias then: its part in d_p is the same for all keys
        out -= v_bias
    delta = tl.sum(do * out, 1)
    tl.store(delta_ptr + rows, delta * ((256 - threshold) / 256), mask=rows < N)
    if TAIL:
        q = _queries(q_ptr, q_bias_ptr, rows, stride_q, N % ROWS == 0, N, D).to(tl.float32)
        normaliser = tl.load(normaliser_ptr + rows, mask=rows < N, other=float("inf"))
        scores = tl.sum(q * load_row(k_tail_ptr, D)[None, :], 1) * (factor(D) * LOG2E)
        p = tl.exp2(scores - normaliser)
        if threshold > 0:
            keep = keep_column(tl.load(seed_ptr), rows, M - 1, sequence, threshold)
            d_p = tl.sum(do * (load_row(v_tail_ptr, D)[None, :] + v_bias), 1)
            d_scores = p * (tl.where(keep, d_p * (256 / (256 - threshold)), 0.0) - delta) * factor(D)
            p = tl.where(keep, p * (256 / (256 - threshold)), 0.0)
        else:
            d_p = tl.sum(do * load_row(v_tail_ptr, D)[None, :], 1)
            d_scores = p * (d_p - delta) * factor(D)
        tl.store(delta_ptr + N + rows, d_scores, mask=rows < N)
        dk_tail += d_scores[:, None] * q
        dv_tail += p[:, None] * do
    return dk_tail, dv_tail


@triton.jit
def _backward_rows(
    q_ptr, do_ptr, dq_ptr, normaliser_ptr, delta_ptr, keys, values, dk, dv, dq_sum, k_tail_ptr, q_bias_ptr,
    seed_ptr, sequence, seen, start, stride_q: tl.constexpr, stride_do: tl.constexpr, stride_dq: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TAIL: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    threshold: tl.constexpr,
):  # fmt: skip
    """Add ROWS queries to the gradients of keys and values, which are scaled at the end; write their dq."""
    whole: tl.constexpr = N % ROWS == 0
    rows = start + tl.arange(0, ROWS)
    q = _queries(q_ptr, q_bias_ptr, rows, stride_q, whole, N, D)
    do = load_tile(do_ptr, rows, stride_do, N, whole, D)
    if seen is not None:
        do = tl.where(seen > 0, do, 0.0)
    dq = tl.zeros([D, ROWS] if transposes_dq(D, ROWS) else [ROWS, D], tl.float32)
    new_dk = ()
    new_dv = ()
    for chunk in tl.static_range(len(keys)):
        if chunk > 0:
            tl.debug_barrier()  # one chunk after the other: products of both at once would spill
        k = keys[chunk]
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (factor(D) * LOG2E)  # (KEYS, ROWS)
        if normaliser_ptr is not None:
            normaliser = tl.load(normaliser_ptr + rows, mask=rows < N, other=float("inf"))
            scores -= normaliser[None, :]
            if MASKED:
                # Rows without a key are zeros: any finite weight will do. No true one is above 1.
                scores = tl.minimum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)
            p = tl.exp2(scores)
        else:  # all keys are in this chunk
            if MASKED:
                scores = tl.where(tl.arange(0, KEYS)[:, None] < M, scores, float("-inf"))
            if CAUSAL or seen is not None:
                scores = hide(scores, tl.arange(0, KEYS)[:, None], rows[None, :], seen, CAUSAL)
            p = tl.exp2(scores - tl.max(scores, 0)[None, :])
            p *= (1 / tl.sum(p, 0))[None, :]
        if threshold > 0:
            groups = chunk * (KEYS // 16) + tl.arange(0, KEYS // 16)
            seed = tl.load(seed_ptr)
            keep = keep_tile_transposed(seed, rows, groups, sequence, threshold, ROWS, KEYS // 16)
            new_dv += (tl.dot(tl.where(keep, p, 0.0).to(do.dtype), do, dv[chunk], input_precision="ieee"),)
        else:
            new_dv += (tl.dot(p.to(do.dtype), do, dv[chunk], input_precision="ieee"),)
        d_p = tl.dot(values[chunk], tl.trans(do), input_precision="ieee")
        if threshold > 0:
            d_p = tl.where(keep, d_p, 0.0)
        if normaliser_ptr is not None:
            delta = tl.load(delta_ptr + rows, mask=rows < N, other=0.0)
        else:
            delta = tl.sum(p * d_p, 0)
        d_scores = (p * (d_p - delta[None, :])).to(q.dtype)
        new_dk += (tl.dot(d_scores, q, dk[chunk], input_precision="ieee"),)
        if transposes_dq(D, ROWS):
            dq = tl.dot(tl.trans(k), d_scores, dq, input_precision="ieee")
        else:
            dq = tl.dot(tl.trans(d_scores), k, dq, input_precision="ieee")
    dq *= factor(D) * (256 / (256 - threshold))
    if TAIL:
        d_tail = tl.load(delta_ptr + N + rows, mask=rows < N, other=0.0)
        k_tail = load_row(k_tail_ptr, D)
        if transposes_dq(D, ROWS):
            dq += d_tail[None, :] * k_tail[:, None]
        else:
            dq += d_tail[:, None] * k_tail[None, :]
    if transposes_dq(D, ROWS):
        if BIAS:
            dq_sum += tl.sum(dq, 1)  # within a warp
        dq = tl.trans(dq)
    elif BIAS:
        dq_sum += dq
    store_tile(dq_ptr, dq, rows, stride_dq, N, whole, D)
    return new_dk, new_dv, dq_sum


@triton.jit
def _store_row(ptr, row, D: tl.constexpr):
    tl.store(ptr + tl.arange(0, D), row.to(ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["first_sequence", "queries"])
def attention_backward(
    q_ptr, k_ptr, v_ptr, do_ptr, out_ptr, normaliser_ptr, delta_ptr, q_bias_ptr, v_bias_ptr, seed_ptr,
    lengths_ptr, dq_ptr, dk_ptr, dv_ptr, dq_bias_ptr, dv_bias_ptr, first_sequence, queries, stride_qs,
    stride_ks, stride_dos, stride_outs, stride_dqs, stride_dks, stride_q: tl.constexpr,
    stride_k: tl.constexpr, stride_do: tl.constexpr, stride_out: tl.constexpr, stride_dq: tl.constexpr,
    stride_dk: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, PREPARED: tl.constexpr, KEYS: tl.constexpr, CHUNKS: tl.constexpr,
    TAIL: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, threshold: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head): N queries in blocks, M keys in CHUNKS of KEYS and a TAIL of one.

    `queries` is N, HIDDEN says that the compiler may not know it: see `attention.hides_trips`. CAUSAL and
    `lengths_ptr` are for one chunk without a normaliser.
    """
    program = tl.program_id(0)
    head = program % H
    number = (program // H).to(tl.int64)
    sequence = first_sequence * H + program
    q_ptr += number * stride_qs + head * D
    k_ptr += number * stride_ks + head * D
    v_ptr += number * stride_ks + head * D
    do_ptr += number * stride_dos + head * D
    dq_ptr += number * stride_dqs + head * D
    dk_ptr += number * stride_dks + head * D
    dv_ptr += number * stride_dks + head * D
    k_tail_ptr = k_ptr + (M - 1) * stride_k
    if q_bias_ptr is not None:
        q_bias_ptr += head * D
    if v_bias_ptr is not None:
        v_bias_ptr += head * D
    BIAS: tl.constexpr = dq_bias_ptr is not None
    if BIAS:
        dq_bias_ptr += number * (H * D) + head * D
        dv_bias_ptr += number * (H * D) + head * D
    if normaliser_ptr is not None:
        normaliser_ptr += program.to(tl.int64) * N
        delta_ptr += program.to(tl.int64) * (2 * N)  # delta, then d_scores of the key apart
        out_ptr += number * stride_outs + head * D
        v_tail_ptr = v_ptr + (M - 1) * stride_k
        dk_tail = tl.zeros([PREPARED, D], tl.float32)
        dv_tail = tl.zeros([PREPARED, D], tl.float32)
        for start in range(0, N, PREPARED):
            dk_tail, dv_tail = _prepare_rows(
                q_ptr, do_ptr, out_ptr, normaliser_ptr, delta_ptr, k_tail_ptr, v_tail_ptr, dk_tail, dv_tail,
                q_bias_ptr, v_bias_ptr, seed_ptr, sequence, start, stride_q, stride_do, stride_out,
                N, M, D, PREPARED, TAIL, threshold,
            )  # fmt: skip
        if TAIL:
            _store_row(dk_ptr + (M - 1) * stride_dk, tl.sum(dk_tail, 0), D)
            _store_row(dv_ptr + (M - 1) * stride_dk, tl.sum(dv_tail, 0), D)
            if BIAS:
                _store_row(dv_bias_ptr, tl.sum(dv_tail, 0), D)
        tl.debug_barrier()  # what this program wrote is read below by other threads of it
    MASKED: tl.constexpr = CHUNKS * KEYS > M
    seen = seen_keys(lengths_ptr, number, M)
    keys = ()
    values = ()
    dk = ()
    dv = ()
    for chunk in tl.static_range(CHUNKS):
        places = chunk * KEYS + tl.arange(0, KEYS)
        keys += (load_keys(k_ptr, places, stride_k, seen, M, not MASKED, D),)
        value = load_keys(v_ptr, places, stride_k, seen, M, not MASKED, D)
        if threshold > 0 and v_bias_ptr is not None:  # else its part in d_p is the same for all keys
            value = (value.to(tl.float32) + load_row(v_bias_ptr, D)[None, :]).to(value.dtype)
            value = tl.where(places[:, None] < M, value, 0.0) if MASKED else value
        values += (value,)
        dk += (tl.zeros([KEYS, D], tl.float32),)
        dv += (tl.zeros([KEYS, D], tl.float32),)
    dq_sum = tl.zeros([D] if transposes_dq(D, BLOCK_M) else [BLOCK_M, D], tl.float32)
    for start in range(0, queries if HIDDEN else N, BLOCK_M):
        dk, dv, dq_sum = _backward_rows(
            q_ptr, do_ptr, dq_ptr, normaliser_ptr, delta_ptr, keys, values, dk, dv, dq_sum, k_tail_ptr,
            q_bias_ptr, seed_ptr, sequence, seen, start, stride_q, stride_do, stride_dq, N, M, D,
            BLOCK_M, KEYS, TAIL, MASKED, BIAS, CAUSAL, threshold,
        )  # fmt: skip
    scale: tl.constexpr = 256 / (256 - threshold)
    dv_bias = tl.zeros([D], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        places = chunk * KEYS + tl.arange(0, KEYS)
        store_tile(dk_ptr, dk[chunk] * (factor(D) * scale), places, stride_dk, M, not MASKED, D)
        store_tile(dv_ptr, dv[chunk] * scale, places, stride_dk, M, not MASKED, D)
        if BIAS:
            inside = places[:, None] < M
            dv_bias += tl.sum(tl.where(inside, dv[chunk], 0.0) if MASKED else dv[chunk], 0) * scale
    if BIAS:  # of this sequence
        if TAIL:
            dv_bias += load_row(dv_bias_ptr, D)
            tl.debug_barrier()  # all have read it before it is written again
        if not transposes_dq(D, BLOCK_M):
            dq_sum = tl.sum(dq_sum, 0)
        _store_row(dq_bias_ptr, dq_sum, D)
        _store_row(dv_bias_ptr, dv_bias, D)


def backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, out: Tensor, normaliser: Tensor | None,
    q_bias: Tensor | None, v_bias: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, dq_bias: Tensor | None,
    dv_bias: Tensor | None, heads: int, threshold: int, seed: Tensor | None, first_sequence: int,
    causal: bool = False, lengths: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the gradients of `attention.forward`.

    q, d_out, out, dq (S, N, H * d); k, v, dk, dv (S, M, H * d), k and v of one stride, dk and dv too. `out`
    and `normaliser` are what the forward pass wrote; the latter is None up to 64 keys, `out` is not read
    then. dq_bias and dv_bias, (S, H * d) fp32 or both None, get the bias gradients of each sequence. `causal`
    and `lengths` as in the forward pass; keys that are not seen get gradients of zero.
    """
    sequences, queries, width = q.shape
    keys, dim = k.shape[1], width // heads
    tail, resident = geometry(keys)
    resident = max(64, tile(resident, 256))  # fewer do not fill the rows of a tensor core product
    major, _ = runtime.capability(q.device)
    blocks = _blocks(resident, dim, threshold, wgmma=major in (9, 10))
    if causal and major not in (9, 10) and dim == 64 and threshold > 0 and keys > 40:
        blocks = blocks._replace(queries=16)  # ptxas spills 32 bytes with 32
    chunk, delta = min(blocks.keys, resident), None
    hidden = major == 9 and (hides_trips(queries, blocks.queries, dim) or 64 < keys < resident)
    if normaliser is not None:
        delta = torch.empty(sequences * heads, 2, queries, dtype=torch.float32, device=q.device)
    runtime.launch(
        attention_backward, (sequences * heads,),
        q, k, v, d_out, out, normaliser, delta, q_bias, v_bias, seed, lengths, dq, dk, dv, dq_bias, dv_bias,
        first_sequence, queries, q.stride(0), k.stride(0), d_out.stride(0), out.stride(0), dq.stride(0),
        dk.stride(0), stride_q=q.stride(1), stride_k=k.stride(1), stride_do=d_out.stride(1),
        stride_out=out.stride(1), stride_dq=dq.stride(1), stride_dk=dk.stride(1), N=queries, M=keys, H=heads,
        D=dim, BLOCK_M=blocks.queries,
        PREPARED=blocks.prepared if normaliser is not None else 16,  # unused then
        KEYS=chunk, CHUNKS=resident // chunk, TAIL=tail, HIDDEN=hidden, CAUSAL=causal,
        threshold=threshold,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip


class Blocks(NamedTuple):
    """Queries of a block, queries whose row sums are computed at a time, keys of a chunk; the launch."""

    queries: int
    prepared: int
    keys: int
    num_warps: int
    num_stages: int = 1


def _blocks(resident: int, dim: int, threshold: int, *, wgmma: bool) -> Blocks:
    """As many queries as registers hold beside the gradients of `resident` keys and values."""
    if resident == 64:
        crowded = not wgmma or (threshold > 0 and dim == 64)
        return Blocks(32 if crowded else 64, 32, 64, num_warps=4)
    return Blocks(64, 32, 128, num_warps=8) if dim == 32 else Blocks(32, 32, 256, num_warps=8)
