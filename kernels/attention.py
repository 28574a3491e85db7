"""Attention forward for short sequences: one program is one head of one sequence.

All keys and values of the head stay in shared memory while the program walks over blocks of queries: each
input is read once. The query bias is added on load; the key bias shifts all scores of a query alike and so
changes nothing; the value bias is added to the context, weighted by the row sum of the (dropped)
probabilities.

Tiles are powers of two, lengths are not: one key more than whole tiles (256 + cls) is taken apart as a
vector, and a few queries more than whole blocks are transposed, so that they are the short side of a product.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
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
from lmim_fast.kernels.dropout import keep_column, keep_tile, keep_tile_transposed
from lmim_fast.kernels.rows import padded_width


@triton.jit
def _forward_rows(
    q_ptr, out_ptr, normaliser_ptr, start, keys, values, k_tail_ptr, v_tail_ptr, q_bias_ptr, v_bias_ptr,
    seed_ptr, sequence, seen, stride_q: tl.constexpr, stride_o: tl.constexpr, whole: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, CAUSAL: tl.constexpr,
    threshold: tl.constexpr,
):  # fmt: skip
    """Context of ROWS queries; the softmax is carried from one chunk of keys to the next."""
    rows = start + tl.arange(0, ROWS)
    q = load_tile(q_ptr, rows, stride_q, N, whole, D).to(tl.float32)
    q = (q + load_row(q_bias_ptr, D)[None, :]).to(q_ptr.dtype.element_ty)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    if TAIL:
        last = tl.sum(q.to(tl.float32) * load_row(k_tail_ptr, D)[None, :], 1) * (factor(D) * LOG2E)
        top = last
    total = tl.zeros([ROWS], tl.float32)
    kept = tl.zeros([ROWS], tl.float32)
    seed = 0
    if threshold > 0:
        seed = tl.load(seed_ptr)  # here, since the keys of all rounds would stay in registers over the loop
    context = tl.zeros([ROWS, D], tl.float32)
    for chunk in tl.static_range(len(keys)):
        scores = tl.dot(q, tl.trans(keys[chunk]), input_precision="ieee") * (factor(D) * LOG2E)
        if (chunk + 1) * BLOCK_N > M:
            columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            scores = tl.where(columns[None, :] < M, scores, float("-inf"))
        if CAUSAL or seen is not None:
            columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            scores = hide(scores, columns[None, :], rows[:, None], seen, CAUSAL)
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        if chunk > 0:
            shrink = tl.exp2(top - higher)
            total *= shrink
            kept *= shrink
            context *= shrink[:, None]
        top = higher
        total += tl.sum(p, 1)
        if threshold > 0:
            groups = chunk * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16)
            p = tl.where(keep_tile(seed, rows, groups, sequence, threshold, ROWS, BLOCK_N // 16), p, 0.0)
            kept += tl.sum(p, 1)
        context = tl.dot(p.to(values[chunk].dtype), values[chunk], context, input_precision="ieee")
    if TAIL:
        p = tl.exp2(last - top)
        total += p
        if threshold > 0:
            p = tl.where(keep_column(seed, rows, M - 1, sequence, threshold), p, 0.0)
            kept += p
        context += p[:, None] * load_row(v_tail_ptr, D)[None, :]
    v_bias = load_row(v_bias_ptr, D)
    if threshold > 0:
        context = (context + kept[:, None] * v_bias[None, :]) * (256 / (256 - threshold) / total)[:, None]
    else:
        context = context / total[:, None] + v_bias[None, :]
    if seen is not None:
        context = tl.where(seen > 0, context, 0.0)
    if normaliser_ptr is not None:
        tl.store(normaliser_ptr + rows, top + tl.log2(total), mask=rows < N)
    store_tile(out_ptr, context, rows, stride_o, N, whole, D)


@triton.jit
def _forward_rows_transposed(
    q_ptr, v_ptr, out_ptr, normaliser_ptr, start, keys, values, k_tail_ptr, v_tail_ptr, q_bias_ptr,
    v_bias_ptr, seed_ptr, sequence, seen, stride_q: tl.constexpr, stride_k: tl.constexpr,
    stride_o: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, threshold: tl.constexpr,
):  # fmt: skip
    """As `_forward_rows` with queries as columns: products of few queries then fill the tensor cores."""
    rows = start + tl.arange(0, ROWS)
    q = load_tile(q_ptr, rows, stride_q, N, False, D).to(tl.float32)
    q = (q + load_row(q_bias_ptr, D)[None, :]).to(q_ptr.dtype.element_ty)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    if TAIL:
        last = tl.sum(q.to(tl.float32) * load_row(k_tail_ptr, D)[None, :], 1) * (factor(D) * LOG2E)
        top = last
    total = tl.zeros([ROWS], tl.float32)
    kept = tl.zeros([ROWS], tl.float32)
    seed = 0
    if threshold > 0:
        seed = tl.load(seed_ptr)  # here, since the keys of all rounds would stay in registers over the loop
    context = tl.zeros([D, ROWS], tl.float32)
    for chunk in tl.static_range(len(keys)):
        scores = tl.dot(keys[chunk], tl.trans(q), input_precision="ieee") * (factor(D) * LOG2E)
        if (chunk + 1) * BLOCK_N > M:
            columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            scores = tl.where(columns[:, None] < M, scores, float("-inf"))
        if seen is not None:
            columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            scores = hide(scores, columns[:, None], rows[None, :], seen, False)
        higher = tl.maximum(top, tl.max(scores, 0))
        p = tl.exp2(scores - higher[None, :])
        if chunk > 0:
            shrink = tl.exp2(top - higher)
            total *= shrink
            kept *= shrink
            context *= shrink[None, :]
        top = higher
        total += tl.sum(p, 0)
        if threshold > 0:
            groups = chunk * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16)
            keep = keep_tile_transposed(seed, rows, groups, sequence, threshold, ROWS, BLOCK_N // 16)
            p = tl.where(keep, p, 0.0)
            kept += tl.sum(p, 0)
        value = values[chunk]
        if D < 64:  # too few rows for wgmma: with mma the tile would stay in registers from the start
            places = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            value = load_keys(v_ptr, places, stride_k, seen, M, (chunk + 1) * BLOCK_N <= M, D)
        context = tl.dot(tl.trans(value), p.to(value.dtype), context, input_precision="ieee")
    if TAIL:
        p = tl.exp2(last - top)
        total += p
        if threshold > 0:
            p = tl.where(keep_column(seed, rows, M - 1, sequence, threshold), p, 0.0)
            kept += p
        context += p[None, :] * load_row(v_tail_ptr, D)[:, None]
    v_bias = load_row(v_bias_ptr, D)
    if threshold > 0:
        context = (context + kept[None, :] * v_bias[:, None]) * (256 / (256 - threshold) / total)[None, :]
    else:
        context = context / total[None, :] + v_bias[:, None]
    if seen is not None:
        context = tl.where(seen > 0, context, 0.0)
    if normaliser_ptr is not None:
        tl.store(normaliser_ptr + rows, top + tl.log2(total), mask=rows < N)
    store_tile(out_ptr, tl.trans(context), rows, stride_o, N, False, D)


@triton.jit
def forward_head(
    program, q_ptr, k_ptr, v_ptr, q_bias_ptr, v_bias_ptr, seed_ptr, lengths_ptr, out_ptr, normaliser_ptr,
    first_sequence, in_blocks, stride_qs, stride_ks, stride_os, stride_q: tl.constexpr,
    stride_k: tl.constexpr, stride_o: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, HIDDEN: tl.constexpr,
    CAUSAL: tl.constexpr, threshold: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head): N queries in blocks and a REST of few, M keys in chunks and a TAIL of one.

    `in_blocks` is N - REST, HIDDEN says that the compiler may not know it: see `hides_trips`. CAUSAL and
    `lengths_ptr` are for keys without a TAIL, CAUSAL for queries without a REST.
    """
    head = program % H
    number = (program // H).to(tl.int64)
    q_ptr += number * stride_qs + head * D
    k_ptr += number * stride_ks + head * D
    v_ptr += number * stride_ks + head * D
    out_ptr += number * stride_os + head * D
    if normaliser_ptr is not None:
        normaliser_ptr += program.to(tl.int64) * N
    sequence = first_sequence * H + program
    if q_bias_ptr is not None:
        q_bias_ptr += head * D
    if v_bias_ptr is not None:
        v_bias_ptr += head * D
    seen = None
    if lengths_ptr is not None:
        seen = seen_keys(lengths_ptr, number, M)
    keys = ()
    values = ()
    for chunk in tl.static_range(CHUNKS):
        places = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        keys += (load_keys(k_ptr, places, stride_k, seen, M, (chunk + 1) * BLOCK_N <= M, D),)
        values += (load_keys(v_ptr, places, stride_k, seen, M, (chunk + 1) * BLOCK_N <= M, D),)
    k_tail_ptr = k_ptr + (M - 1) * stride_k
    v_tail_ptr = v_ptr + (M - 1) * stride_k
    for start in range(0, in_blocks if HIDDEN else N - REST, BLOCK_M):
        _forward_rows(
            q_ptr, out_ptr, normaliser_ptr, start, keys, values, k_tail_ptr, v_tail_ptr, q_bias_ptr,
            v_bias_ptr, seed_ptr, sequence, seen, stride_q, stride_o, (N - REST) % BLOCK_M == 0, N, M, D,
            BLOCK_M, BLOCK_N, TAIL, CAUSAL, threshold,
        )  # fmt: skip
    if REST > 0:
        _forward_rows_transposed(
            q_ptr, v_ptr, out_ptr, normaliser_ptr, N - REST, keys, values, k_tail_ptr, v_tail_ptr,
            q_bias_ptr, v_bias_ptr, seed_ptr, sequence, seen, stride_q, stride_k, stride_o, N, M, D,
            REST_BLOCK, BLOCK_N, TAIL, threshold,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_sequence", "in_blocks"])
def attention_forward(
    q_ptr, k_ptr, v_ptr, q_bias_ptr, v_bias_ptr, seed_ptr, lengths_ptr, out_ptr, normaliser_ptr,
    first_sequence, in_blocks, stride_qs, stride_ks, stride_os, stride_q: tl.constexpr,
    stride_k: tl.constexpr, stride_o: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, HIDDEN: tl.constexpr,
    CAUSAL: tl.constexpr, threshold: tl.constexpr,
):  # fmt: skip
    """A program for each head of each sequence."""
    forward_head(
        tl.program_id(0), q_ptr, k_ptr, v_ptr, q_bias_ptr, v_bias_ptr, seed_ptr, lengths_ptr, out_ptr,
        normaliser_ptr, first_sequence, in_blocks, stride_qs, stride_ks, stride_os, stride_q, stride_k,
        stride_o, N, M, H, D, BLOCK_M, REST, REST_BLOCK, BLOCK_N, CHUNKS, TAIL, HIDDEN, CAUSAL, threshold,
    )  # fmt: skip


def tile(count: int, largest: int) -> int:
    """The smallest power of two, 16 at least, that holds `count`; `largest` at most."""
    return min(padded_width(count), largest)


def geometry(keys: int) -> tuple[bool, int]:
    """Whether one key stands apart (256 + cls), and the keys in whole tiles."""
    tail = keys > 128 and keys % 128 == 1
    return tail, keys - 1 if tail else keys


def hides_trips(queries: int, rows: int, dim: int) -> bool:
    """Whether a kernel for Hopper gets the number of trips over its queries as an argument.

    The compiler drops a loop that it knows to have one trip, and may then put the tile that a product reads
    across its lines at the end of shared memory: Hopper may read past it if heads are narrow
    (benchmarks/wgmma.py).
    """
    return queries <= rows and dim < 64


class Blocks(NamedTuple):
    """Queries of a block, last queries that are transposed at most, keys of a tile; the launch."""

    queries: int
    transposed: int
    keys: int
    num_warps: int
    num_stages: int = 1


BLOCKS = Blocks(64, 32, 64, num_warps=4)


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_bias: Tensor | None, v_bias: Tensor | None, out: Tensor,
    normaliser: Tensor | None, heads: int, threshold: int, seed: Tensor | None, first_sequence: int,
    causal: bool = False, lengths: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the context of q (S, N, H * d) over k and v (S, M, H * d) into `out` (S, N, H * d).

    `normaliser` (S * H * N,) fp32, or None, gets the log2 of each query's softmax denominator for the
    backward pass. Last dimensions are contiguous; k and v have one stride. Biases are (H * d,) or None.
    `threshold` and `seed` as in kernels/dropout.py; the mask's sequence is (first_sequence + s) * H + head.
    With `causal` query i sees keys 0..i, N = M; `lengths` (S,) says how many keys a sequence sees, the memory
    of the others is not read. Either is for up to 64 keys.
    """
    sequences, queries, width = q.shape
    keys, dim = k.shape[1], width // heads
    constants = constants_of(queries, keys, dim, runtime.capability(q.device)[0], BLOCKS)
    stride_qs, stride_q, _ = q.stride()
    stride_ks, stride_k, _ = k.stride()
    stride_os, stride_o, _ = out.stride()
    runtime.launch(
        attention_forward, (sequences * heads,),
        q, k, v, q_bias, v_bias, seed, lengths, out, normaliser, first_sequence, queries - constants["REST"],
        stride_qs, stride_ks, stride_os, stride_q=stride_q, stride_k=stride_k, stride_o=stride_o, H=heads,
        CAUSAL=causal, threshold=threshold, **constants,
    )  # fmt: skip


@functools.cache
def constants_of(queries: int, keys: int, dim: int, major: int, blocks: Blocks) -> dict[str, Any]:
    """What follows from the lengths, the width of a head and the device; shared, and so not to be changed."""
    tail, resident = geometry(keys)
    rest = queries % blocks.queries if queries > blocks.queries else 0
    if rest > blocks.transposed:  # a block of their own, with masked rows
        rest = 0
    # On Blackwell ptxas would spill a few bytes to fit one program more than tensor memory allows.
    limited = major == 10 and (dim == 64 or resident <= 128)
    return dict(
        N=queries,
        M=keys,
        D=dim,
        BLOCK_M=blocks.queries,
        REST=rest,
        REST_BLOCK=tile(rest, 32),
        BLOCK_N=blocks.keys,
        CHUNKS=-(-resident // blocks.keys),
        TAIL=tail,
        HIDDEN=major == 9 and hides_trips(queries - rest, blocks.queries, dim),
        maxnreg=runtime.registers(3, blocks.num_warps) if limited else None,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
