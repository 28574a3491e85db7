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

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.kernels.attention import geometry, hides_trips, tile
from lmim_fast.kernels.attention_backward_rows import backward_rows, prepare_rows, store_row, transposes_dq
from lmim_fast.kernels.attention_tiles import factor, load_keys, load_row, seen_keys, store_tile


@triton.jit
def backward_head(
    program, q_ptr, k_ptr, v_ptr, do_ptr, out_ptr, normaliser_ptr, delta_ptr, q_bias_ptr, v_bias_ptr,
    seed_ptr, lengths_ptr, dq_ptr, dk_ptr, dv_ptr, dq_bias_ptr, dv_bias_ptr, first_sequence, queries,
    stride_qs, stride_ks, stride_dos, stride_outs, stride_dqs, stride_dks, stride_q: tl.constexpr,
    stride_k: tl.constexpr, stride_do: tl.constexpr, stride_out: tl.constexpr, stride_dq: tl.constexpr,
    stride_dk: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, PREPARED: tl.constexpr, KEYS: tl.constexpr, CHUNKS: tl.constexpr,
    TAIL: tl.constexpr, HIDDEN: tl.constexpr, CAUSAL: tl.constexpr, threshold: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head): N queries in blocks, M keys in CHUNKS of KEYS and a TAIL of one.

    `queries` is N, HIDDEN says that the compiler may not know it: see `attention.hides_trips`. CAUSAL and
    `lengths_ptr` are for one chunk without a normaliser.
    """
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
            dk_tail, dv_tail = prepare_rows(
                q_ptr, do_ptr, out_ptr, normaliser_ptr, delta_ptr, k_tail_ptr, v_tail_ptr, dk_tail, dv_tail,
                q_bias_ptr, v_bias_ptr, seed_ptr, sequence, start, stride_q, stride_do, stride_out,
                N, M, D, PREPARED, TAIL, threshold,
            )  # fmt: skip
        if TAIL:
            store_row(dk_ptr + (M - 1) * stride_dk, tl.sum(dk_tail, 0), D)
            store_row(dv_ptr + (M - 1) * stride_dk, tl.sum(dv_tail, 0), D)
            if BIAS:
                store_row(dv_bias_ptr, tl.sum(dv_tail, 0), D)
        tl.debug_barrier()  # what this program wrote is read below by other threads of it
    MASKED: tl.constexpr = CHUNKS * KEYS > M
    seen = None
    if lengths_ptr is not None:
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
        dk, dv, dq_sum = backward_rows(
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
        store_row(dq_bias_ptr, dq_sum, D)
        store_row(dv_bias_ptr, dv_bias, D)


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
    """A program for each head of each sequence."""
    backward_head(
        tl.program_id(0), q_ptr, k_ptr, v_ptr, do_ptr, out_ptr, normaliser_ptr, delta_ptr, q_bias_ptr,
        v_bias_ptr, seed_ptr, lengths_ptr, dq_ptr, dk_ptr, dv_ptr, dq_bias_ptr, dv_bias_ptr, first_sequence,
        queries, stride_qs, stride_ks, stride_dos, stride_outs, stride_dqs, stride_dks, stride_q, stride_k,
        stride_do, stride_out, stride_dq, stride_dk, N, M, H, D, BLOCK_M, PREPARED, KEYS, CHUNKS, TAIL,
        HIDDEN, CAUSAL, threshold,
    )  # fmt: skip


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
    major = runtime.capability(q.device)[0]
    blocks = blocks_for(keys, dim, threshold, major)
    delta = None
    if normaliser is not None:
        delta = q.new_empty((sequences * heads, 2, queries), dtype=torch.float32)
    constants = constants_of(queries, keys, dim, threshold, major, causal, normaliser is not None, blocks)
    stride_qs, stride_q, _ = q.stride()
    stride_ks, stride_k, _ = k.stride()
    stride_dos, stride_do, _ = d_out.stride()
    stride_outs, stride_out, _ = out.stride()
    stride_dqs, stride_dq, _ = dq.stride()
    stride_dks, stride_dk, _ = dk.stride()
    runtime.launch(
        attention_backward, (sequences * heads,),
        q, k, v, d_out, out, normaliser, delta, q_bias, v_bias, seed, lengths, dq, dk, dv, dq_bias, dv_bias,
        first_sequence, queries, stride_qs, stride_ks, stride_dos, stride_outs, stride_dqs, stride_dks,
        stride_q=stride_q, stride_k=stride_k, stride_do=stride_do, stride_out=stride_out,
        stride_dq=stride_dq, stride_dk=stride_dk, H=heads, **constants,
    )  # fmt: skip


@functools.cache
def _resident(keys: int) -> int:
    """Keys in tiles: fewer than 64 do not fill the rows of a tensor core product."""
    return max(64, tile(geometry(keys)[1], 256))


@functools.cache
def constants_of(
    queries: int, keys: int, dim: int, threshold: int, major: int, causal: bool, prepares: bool,
    blocks: Blocks,
) -> dict[str, Any]:  # fmt: skip
    """What follows from the lengths, the width of a head and the device; shared, and so not to be changed."""
    resident = _resident(keys)
    if causal and major not in (9, 10) and dim == 64 and threshold > 0 and keys > 40:
        blocks = blocks._replace(queries=16)  # ptxas spills 32 bytes with 32
    chunk = min(blocks.keys, resident)
    # On Blackwell ptxas would spill 8 bytes to fit one program more.
    few = dim == 64 and resident == 256 and queries <= 32
    many = dim == 32 and resident == 64 and queries > 64
    roomy = (1 if few else 2) if major == 10 and (few or many) else 0
    return dict(
        N=queries,
        M=keys,
        D=dim,
        BLOCK_M=blocks.queries,
        PREPARED=blocks.prepared if prepares else 16,  # unused then
        KEYS=chunk,
        CHUNKS=resident // chunk,
        TAIL=geometry(keys)[0],
        HIDDEN=major == 9 and (hides_trips(queries, blocks.queries, dim) or 64 < keys < resident),
        CAUSAL=causal,
        threshold=threshold,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        maxnreg=runtime.registers(roomy, blocks.num_warps) if roomy else None,
    )


class Blocks(NamedTuple):
    """Queries of a block, queries whose row sums are computed at a time, keys of a chunk; the launch."""

    queries: int
    prepared: int
    keys: int
    num_warps: int
    num_stages: int = 1


def prepares(keys: int) -> bool:
    """Whether row sums are computed in a walk of their own, from what the forward pass kept."""
    return _resident(keys) > 64


def blocks_for(keys: int, dim: int, threshold: int, major: int) -> Blocks:
    """The launch for so many keys."""
    return _blocks(_resident(keys), dim, threshold, wgmma=major in (9, 10))


def _blocks(resident: int, dim: int, threshold: int, *, wgmma: bool) -> Blocks:
    """As many queries as registers hold beside the gradients of `resident` keys and values."""
    if resident == 64:
        crowded = not wgmma or (threshold > 0 and dim == 64)
        return Blocks(32 if crowded else 64, 32, 64, num_warps=4)
    return Blocks(64, 32, 128, num_warps=8) if dim == 32 else Blocks(32, 32, 256, num_warps=8)
