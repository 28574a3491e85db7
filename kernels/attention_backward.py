"""Attention backward for short sequences: one program is one head of one sequence, five products a block.

The gradients of keys and values stay in registers while the program walks over blocks of queries: no atomics,
and the probabilities are made once. Keys are rows of each tile, queries its columns. Up to 64 keys nothing
but the inputs is kept from the forward pass. Beyond, a first walk over the queries writes what their score
gradients subtract (delta = context x its gradient) and does all of the one key that may stand apart, so that
the second needs no reduction over the keys and spills no register. More keys than one tile holds are cut into
parts: a program is then one part, and the parts of dq are added up afterwards.

The key bias has no gradient: it shifts all scores of a query alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from lmim_fast.kernels import runtime
from lmim_fast.kernels.attention import LOG2E, geometry, load_row, load_tile, store_tile, tile
from lmim_fast.kernels.dropout import keep_column, keep_tile_transposed
from torch import Tensor


@triton.jit
def _queries(
    q_ptr, q_bias_ptr, rows, stride_q: tl.constexpr, whole: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries with their bias, (R, BLOCK_D) in their own type."""
    q = load_tile(q_ptr, rows, stride_q, N, whole, D, BLOCK_D)
    if q_bias_ptr is not None:
        q = (q.to(tl.float32) + load_row(q_bias_ptr, D, BLOCK_D)[None, :]).to(q.dtype)
    return q


@triton.jit
def _prepare_rows(
    q_ptr, do_ptr, out_ptr, normaliser_ptr, delta_ptr, k_tail_ptr, v_tail_ptr, dk_tail, dv_tail, q_bias_ptr,
    v_bias_ptr, seed_ptr, sequence, factor, start, stride_q: tl.constexpr, stride_do: tl.constexpr,
    stride_out: tl.constexpr, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TAIL: tl.constexpr, threshold: tl.constexpr,
):  # fmt: skip
    """Write delta of ROWS queries and the score gradients of a key apart; add to that key's gradients."""
    rows = start + tl.arange(0, ROWS)
    do = load_tile(do_ptr, rows, stride_do, N, N % ROWS == 0, D, BLOCK_D).to(tl.float32)
    out = load_tile(out_ptr, rows, stride_out, N, N % ROWS == 0, D, BLOCK_D).to(tl.float32)
    v_bias = load_row(v_bias_ptr, D, BLOCK_D)[None, :]
    if threshold == 0:  # d_p leaves out the bias then: its part in d_p is the same for all keys
        out -= v_bias
    delta = tl.sum(do * out, 1)
    tl.store(delta_ptr + rows, delta, mask=rows < N)
    if TAIL:
        q = _queries(q_ptr, q_bias_ptr, rows, stride_q, N % ROWS == 0, N, D, BLOCK_D).to(tl.float32)
        normaliser = tl.load(normaliser_ptr + rows, mask=rows < N, other=float("inf"))
        scores = tl.sum(q * load_row(k_tail_ptr, D, BLOCK_D)[None, :], 1) * (factor * LOG2E)
        p = tl.exp2(scores - normaliser)
        if threshold > 0:
            keep = keep_column(tl.load(seed_ptr), rows, M - 1, sequence, threshold)
            d_p = tl.sum(do * (load_row(v_tail_ptr, D, BLOCK_D)[None, :] + v_bias), 1)
            d_scores = p * (tl.where(keep, d_p * (256 / (256 - threshold)), 0.0) - delta) * factor
            p = tl.where(keep, p * (256 / (256 - threshold)), 0.0)
        else:
            d_p = tl.sum(do * load_row(v_tail_ptr, D, BLOCK_D)[None, :], 1)
            d_scores = p * (d_p - delta) * factor
        tl.store(delta_ptr + N + rows, d_scores, mask=rows < N)
        dk_tail += d_scores[:, None] * q
        dv_tail += p[:, None] * do
    return dk_tail, dv_tail


@triton.jit
def _backward_rows(
    q_ptr, do_ptr, dq_ptr, normaliser_ptr, delta_ptr, k, v, dk, dv, score_sums, k_tail_ptr, q_bias_ptr,
    v_bias_ptr, seed_ptr, sequence, factor, start, first_key, stride_q: tl.constexpr,
    stride_do: tl.constexpr, stride_dq: tl.constexpr, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
    BIAS: tl.constexpr, threshold: tl.constexpr,
):  # fmt: skip
    """Add ROWS queries to the gradients of the keys and values; write their dq."""
    scale: tl.constexpr = 256 / (256 - threshold)
    whole: tl.constexpr = N % ROWS == 0
    rows = start + tl.arange(0, ROWS)
    q = _queries(q_ptr, q_bias_ptr, rows, stride_q, whole, N, D, BLOCK_D)
    do = load_tile(do_ptr, rows, stride_do, N, whole, D, BLOCK_D)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (KEYS, ROWS)
    d_p = tl.dot(v, tl.trans(do), input_precision="ieee")
    scores *= factor * LOG2E
    if MASKED:
        places = first_key + tl.arange(0, KEYS)
        scores = tl.where(places[:, None] < M, scores, float("-inf"))
    if normaliser_ptr is not None:
        normaliser = tl.load(normaliser_ptr + rows, mask=rows < N, other=float("inf"))
        p = tl.exp2(scores - normaliser[None, :])
    else:
        p = tl.exp2(scores - tl.max(scores, 0)[None, :])
        p *= (1 / tl.sum(p, 0))[None, :]
    if threshold > 0:
        groups = first_key // 16 + tl.arange(0, KEYS // 16)
        keep = keep_tile_transposed(tl.load(seed_ptr), rows, groups, sequence, threshold, ROWS, KEYS // 16)
        shift = tl.sum(do.to(tl.float32) * load_row(v_bias_ptr, D, BLOCK_D)[None, :], 1)
        d_p = tl.where(keep, (d_p + shift[None, :]) * scale, 0.0)
    if normaliser_ptr is not None:
        delta = tl.load(delta_ptr + rows, mask=rows < N, other=0.0)
    else:
        delta = tl.sum(p * d_p, 0)
    d_scores = p * (d_p - delta[None, :]) * factor
    if threshold > 0:
        p = tl.where(keep, p * scale, 0.0)
    if BIAS:
        score_sums += tl.sum(d_scores, 1)
    d_scores_low = d_scores.to(q.dtype)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dk = tl.dot(d_scores_low, q, dk, input_precision="ieee")
    if (
        BLOCK_D >= 64 and ROWS < 64
    ):  # the head's width fills the rows of a tensor core product, the queries do not
        dq = tl.trans(tl.dot(tl.trans(k), d_scores_low, input_precision="ieee"))
    else:
        dq = tl.dot(tl.trans(d_scores_low), k, input_precision="ieee")
    if TAIL:
        d_tail = tl.load(delta_ptr + N + rows, mask=rows < N, other=0.0)
        dq += d_tail[:, None] * load_row(k_tail_ptr, D, BLOCK_D)[None, :]
    store_tile(dq_ptr, dq, rows, stride_dq, N, whole, D, BLOCK_D)
    return dk, dv, score_sums


@triton.jit
def _store_row(ptr, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    tl.store(ptr + columns, row.to(ptr.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["first_sequence"])
def attention_backward(
    q_ptr, k_ptr, v_ptr, do_ptr, out_ptr, normaliser_ptr, delta_ptr, q_bias_ptr, v_bias_ptr, seed_ptr,
    dq_ptr, dk_ptr, dv_ptr, dq_bias_ptr, dv_bias_ptr, first_sequence, factor, stride_qs, stride_ks,
    stride_dos, stride_outs, stride_dqs, stride_dqp, stride_dks, stride_q: tl.constexpr,
    stride_k: tl.constexpr, stride_do: tl.constexpr, stride_out: tl.constexpr, stride_dq: tl.constexpr,
    stride_dk: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PREPARED: tl.constexpr, KEYS: tl.constexpr,
    PARTS: tl.constexpr, TAIL: tl.constexpr, threshold: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, part of the keys)."""
    program = tl.program_id(0)
    part = program % PARTS
    sequence = program // PARTS
    head = sequence % H
    number = (sequence // H).to(tl.int64)
    first_key = part * KEYS
    drawn = first_sequence * H + sequence
    q_ptr += number * stride_qs + head * D
    k_ptr += number * stride_ks + head * D
    v_ptr += number * stride_ks + head * D
    do_ptr += number * stride_dos + head * D
    dq_ptr += part * stride_dqp + number * stride_dqs + head * D
    dk_ptr += number * stride_dks + head * D
    dv_ptr += number * stride_dks + head * D
    k_tail_ptr = k_ptr + (M - 1) * stride_k
    if q_bias_ptr is not None:
        q_bias_ptr += head * D
    if v_bias_ptr is not None:
        v_bias_ptr += head * D
    BIAS: tl.constexpr = dq_bias_ptr is not None
    if BIAS:
        dq_bias_ptr += (number * PARTS + part) * (H * D) + head * D
        dv_bias_ptr += (number * PARTS + part) * (H * D) + head * D
    if normaliser_ptr is not None:
        normaliser_ptr += sequence.to(tl.int64) * N
        delta_ptr += program.to(tl.int64) * (2 * N)  # delta, then d_scores of the key apart
        out_ptr += number * stride_outs + head * D
        v_tail_ptr = v_ptr + (M - 1) * stride_k
        dk_tail = tl.zeros([PREPARED, BLOCK_D], tl.float32)
        dv_tail = tl.zeros([PREPARED, BLOCK_D], tl.float32)
        for start in range(0, N, PREPARED):
            dk_tail, dv_tail = _prepare_rows(
                q_ptr, do_ptr, out_ptr, normaliser_ptr, delta_ptr, k_tail_ptr, v_tail_ptr, dk_tail, dv_tail,
                q_bias_ptr, v_bias_ptr, seed_ptr, drawn, factor, start, stride_q, stride_do, stride_out, N, M,
                D, BLOCK_D, PREPARED, TAIL, threshold,
            )  # fmt: skip
        if TAIL:
            _store_row(dk_ptr + (M - 1) * stride_dk, tl.sum(dk_tail, 0), D, BLOCK_D)
            _store_row(dv_ptr + (M - 1) * stride_dk, tl.sum(dv_tail, 0), D, BLOCK_D)
            if BIAS:
                _store_row(dv_bias_ptr, tl.sum(dv_tail, 0), D, BLOCK_D)
        tl.debug_barrier()  # what this program wrote is read below by other threads of it
    places = first_key + tl.arange(0, KEYS)
    MASKED: tl.constexpr = PARTS * KEYS > M
    k = load_tile(k_ptr, places, stride_k, M, not MASKED, D, BLOCK_D)
    v = load_tile(v_ptr, places, stride_k, M, not MASKED, D, BLOCK_D)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    score_sums = tl.zeros([KEYS], tl.float32)
    for start in range(0, N, BLOCK_M):
        dk, dv, score_sums = _backward_rows(
            q_ptr, do_ptr, dq_ptr, normaliser_ptr, delta_ptr, k, v, dk, dv, score_sums, k_tail_ptr,
            q_bias_ptr, v_bias_ptr, seed_ptr, drawn, factor, start, first_key, stride_q, stride_do,
            stride_dq, N, M, D,
            BLOCK_D, BLOCK_M, KEYS, TAIL, MASKED, BIAS, threshold,
        )  # fmt: skip
    store_tile(dk_ptr, dk, places, stride_dk, M, not MASKED, D, BLOCK_D)
    store_tile(dv_ptr, dv, places, stride_dk, M, not MASKED, D, BLOCK_D)
    if BIAS:  # of this sequence and part
        keys = load_tile(k_ptr, places, stride_k, M, not MASKED, D, BLOCK_D).to(tl.float32)
        dq_bias = tl.sum(score_sums[:, None] * keys, 0)
        dv_bias = tl.sum(dv, 0)
        if TAIL:
            rows = tl.arange(0, triton.next_power_of_2(N))
            d_tail = tl.load(delta_ptr + N + rows, mask=rows < N, other=0.0)
            dq_bias += tl.sum(d_tail, 0) * load_row(k_tail_ptr, D, BLOCK_D)
            dv_bias += load_row(dv_bias_ptr, D, BLOCK_D)
            tl.debug_barrier()  # all have read it before it is written again
        _store_row(dq_bias_ptr, dq_bias, D, BLOCK_D)
        _store_row(dv_bias_ptr, dv_bias, D, BLOCK_D)


def backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, out: Tensor, normaliser: Tensor | None,
    q_bias: Tensor | None, v_bias: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, dq_bias: Tensor | None,
    dv_bias: Tensor | None, heads: int, threshold: int, seed: Tensor | None, first_sequence: int,
) -> None:  # fmt: skip
    """Write the gradients of `attention.forward`.

    q, d_out, out, dq (S, N, H * d); k, v, dk, dv (S, M, H * d), k and v of one stride, dk and dv too. `out`
    and `normaliser` are what the forward pass wrote; the latter is None up to 64 keys, `out` is not read
    then. dq_bias and dv_bias, (S * `parts(M, d)`, H * d) fp32 or both None, get the bias gradients of each
    sequence and part.
    """
    sequences, queries, width = q.shape
    keys, dim = k.shape[1], width // heads
    block_d, tail, keys_tile, count = _plan(keys, dim)
    major, _ = runtime.capability(q.device)
    blocks = _blocks(keys_tile, block_d, threshold, wgmma=major in (9, 10))
    parts_of_dq, delta = dq[None], None
    if normaliser is not None:
        size = (sequences * heads * count, 2, queries)
        delta = torch.empty(size, dtype=torch.float32, device=q.device)
    if count > 1:
        parts_of_dq = torch.empty(count, *dq.shape, dtype=torch.float32, device=q.device)
    prepared = blocks.prepared if normaliser is not None else 16  # unused then
    runtime.launch(
        attention_backward, (sequences * heads * count,),
        q, k, v, d_out, out, normaliser, delta, q_bias, v_bias, seed, parts_of_dq, dk, dv, dq_bias, dv_bias,
        first_sequence, dim**-0.5, q.stride(0), k.stride(0), d_out.stride(0), out.stride(0),
        parts_of_dq.stride(1), parts_of_dq.stride(0), dk.stride(0), stride_q=q.stride(1),
        stride_k=k.stride(1), stride_do=d_out.stride(1), stride_out=out.stride(1),
        stride_dq=parts_of_dq.stride(2), stride_dk=dk.stride(1), N=queries, M=keys, H=heads, D=dim,
        BLOCK_D=block_d, BLOCK_M=min(blocks.queries, tile(queries, 64)), PREPARED=prepared,
        KEYS=keys_tile, PARTS=count, TAIL=tail, threshold=threshold, num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )  # fmt: skip
    if count > 1:
        dq.copy_(parts_of_dq.sum(0))


def parts(keys: int, dim: int) -> int:
    """Parts that the keys are cut into: 1 up to 256 keys (and one more) of head width 64."""
    return _plan(keys, dim)[3]


def _plan(keys: int, dim: int) -> tuple[int, bool, int, int]:
    """Padded head width, whether a key stands apart, keys of a tile, number of tiles."""
    block_d, tail, resident = geometry(keys, dim)
    largest = 256 if block_d <= 64 else 128
    if resident > largest:
        tail, resident = False, keys
    keys_tile = tile(resident, largest)
    return block_d, tail, keys_tile, triton.cdiv(resident, keys_tile)


class Blocks(NamedTuple):
    """Queries of a block, queries whose row sums are made at a time before; the launch."""

    queries: int
    prepared: int
    num_warps: int
    num_stages: int = 1


def _blocks(keys_tile: int, block_d: int, threshold: int, *, wgmma: bool) -> Blocks:
    """As many queries as registers hold beside the gradients of keys and values."""
    if keys_tile <= 64:
        return Blocks(64, 32, num_warps=4 if keys_tile * block_d <= 64 * (64 if wgmma else 32) else 8)
    crowded = threshold > 0 and block_d >= 64
    return Blocks(16 if crowded else 32, 32, num_warps=4 if keys_tile <= 128 and block_d <= 32 else 8)
