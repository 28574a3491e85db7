"""A block of queries in the backward pass of attention: both walks over the queries take these steps."""

from __future__ import annotations

import triton
import triton.language as tl

from lmim_fast.kernels.attention_tiles import LOG2E, factor, hide, load_row, load_tile, store_tile
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
def prepare_rows(
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
def backward_rows(
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
def store_row(ptr, row, D: tl.constexpr):
    """D values, in the pointer's type."""
    tl.store(ptr + tl.arange(0, D), row.to(ptr.dtype.element_ty))
