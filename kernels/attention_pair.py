"""Self-attention of two segments in one launch, forward and backward, where the grids of both are small.

The segments lie one after the other in the same rows. A program does for its segment what it would do in a
launch of its own, to the bit as long as the compiler fuses the same products and sums. The longer segment's
programs have the first numbers: they take longest and start first. All programs get the registers and the
shared memory of the larger ones.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import attention, attention_backward, runtime
from lmim_fast.kernels.attention import forward_head
from lmim_fast.kernels.attention_backward import backward_head

# Programs a multiprocessor up to which two segments share a launch. Not measured yet, to be on a device
# (benchmarks/bench_attention_pair.py): a second launch costs a few microseconds, and both end with idle
# multiprocessors; larger grids lose more by the shorter segment's occupancy, which is that of the longer one.
PAIRED_PROGRAMS = 8


@triton.jit
def _forward_segment(
    program, qkv_ptr, q_bias_ptr, v_bias_ptr, seed_ptr, out_ptr, normaliser_ptr, first, row, in_blocks,
    stride_qkv: tl.constexpr, stride_out: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr, TAIL: tl.constexpr, HIDDEN: tl.constexpr, BOTH_KEPT: tl.constexpr,
    threshold: tl.constexpr,
):  # fmt: skip
    """A head of a sequence of the segment that begins with sequence `first` in this row."""
    row = row.to(tl.int64)
    qkv_ptr += row * stride_qkv
    out_ptr += row * stride_out
    if BOTH_KEPT:
        normaliser_ptr += row * H
    forward_head(
        program, qkv_ptr, qkv_ptr + H * D, qkv_ptr + 2 * H * D, q_bias_ptr, v_bias_ptr, seed_ptr, None,
        out_ptr, normaliser_ptr, first, in_blocks, N * stride_qkv, N * stride_qkv, N * stride_out, stride_qkv,
        stride_qkv, stride_out, N, N, H, D, BLOCK_M, REST, REST_BLOCK, BLOCK_N, CHUNKS, TAIL, HIDDEN, False,
        threshold,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["long_programs", "long_first", "short_first", "long_in_blocks", "short_in_blocks"]
)
def attention_forward_pair(
    qkv_ptr, q_bias_ptr, v_bias_ptr, seed_ptr, out_ptr, normaliser_ptr, long_programs, long_first,
    short_first, long_in_blocks, short_in_blocks, stride_qkv: tl.constexpr, stride_out: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LONG_N: tl.constexpr, LONG_REST: tl.constexpr, LONG_REST_BLOCK: tl.constexpr, LONG_CHUNKS: tl.constexpr,
    LONG_TAIL: tl.constexpr, LONG_HIDDEN: tl.constexpr,
    SHORT_N: tl.constexpr, SHORT_REST: tl.constexpr, SHORT_REST_BLOCK: tl.constexpr,
    SHORT_CHUNKS: tl.constexpr, SHORT_TAIL: tl.constexpr, SHORT_HIDDEN: tl.constexpr,
    BOTH_KEPT: tl.constexpr, threshold: tl.constexpr,
):  # fmt: skip
    """The first `long_programs` are for the longer segment, the others for the shorter one.

    `long_first` and `short_first` are the sequences before each: 0, or all of the other. BOTH_KEPT: the
    shorter segment has normalisers too, else at most the longer one has.
    """
    program = tl.program_id(0)
    if program < long_programs:
        _forward_segment(
            program, qkv_ptr, q_bias_ptr, v_bias_ptr, seed_ptr, out_ptr, normaliser_ptr, long_first,
            long_first * SHORT_N, long_in_blocks, stride_qkv, stride_out, LONG_N, H, D, BLOCK_M, LONG_REST,
            LONG_REST_BLOCK, BLOCK_N, LONG_CHUNKS, LONG_TAIL, LONG_HIDDEN, BOTH_KEPT, threshold,
        )  # fmt: skip
    else:
        _forward_segment(
            program - long_programs, qkv_ptr, q_bias_ptr, v_bias_ptr, seed_ptr, out_ptr,
            normaliser_ptr if BOTH_KEPT else None, short_first, short_first * LONG_N, short_in_blocks,
            stride_qkv, stride_out, SHORT_N, H, D, BLOCK_M, SHORT_REST, SHORT_REST_BLOCK, BLOCK_N,
            SHORT_CHUNKS, SHORT_TAIL, SHORT_HIDDEN, BOTH_KEPT, threshold,
        )  # fmt: skip


@triton.jit
def _backward_segment(
    program, qkv_ptr, do_ptr, q_bias_ptr, v_bias_ptr, seed_ptr, dqkv_ptr, dq_bias_ptr, dv_bias_ptr, first,
    row, queries, stride_qkv: tl.constexpr, stride_do: tl.constexpr, stride_dqkv: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, PREPARED: tl.constexpr,
    KEYS: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr, HIDDEN: tl.constexpr,
    threshold: tl.constexpr,
):  # fmt: skip
    """A head of a sequence of the segment that begins with sequence `first` in this row."""
    row = row.to(tl.int64)
    qkv_ptr += row * stride_qkv
    do_ptr += row * stride_do
    dqkv_ptr += row * stride_dqkv
    if dq_bias_ptr is not None:
        dq_bias_ptr += first.to(tl.int64) * (H * D)
        dv_bias_ptr += first.to(tl.int64) * (H * D)
    backward_head(
        program, qkv_ptr, qkv_ptr + H * D, qkv_ptr + 2 * H * D, do_ptr, None, None, None, q_bias_ptr,
        v_bias_ptr, seed_ptr, None, dqkv_ptr, dqkv_ptr + H * D, dqkv_ptr + 2 * H * D, dq_bias_ptr,
        dv_bias_ptr, first, queries, N * stride_qkv, N * stride_qkv, N * stride_do, 0, N * stride_dqkv,
        N * stride_dqkv, stride_qkv, stride_qkv, stride_do, 0, stride_dqkv, stride_dqkv, N, N, H, D, BLOCK_M,
        PREPARED, KEYS, CHUNKS, TAIL, HIDDEN, False, threshold,
    )  # fmt: skip


@triton.jit(do_not_specialize=["long_programs", "long_first", "short_first", "long_queries", "short_queries"])
def attention_backward_pair(
    qkv_ptr, do_ptr, q_bias_ptr, v_bias_ptr, seed_ptr, dqkv_ptr, dq_bias_ptr, dv_bias_ptr, long_programs,
    long_first, short_first, long_queries, short_queries, stride_qkv: tl.constexpr, stride_do: tl.constexpr,
    stride_dqkv: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    PREPARED: tl.constexpr, KEYS: tl.constexpr, CHUNKS: tl.constexpr, TAIL: tl.constexpr,
    LONG_N: tl.constexpr, LONG_HIDDEN: tl.constexpr, SHORT_N: tl.constexpr, SHORT_HIDDEN: tl.constexpr,
    threshold: tl.constexpr,
):  # fmt: skip
    """As `attention_forward_pair`, for segments without normalisers."""
    program = tl.program_id(0)
    if program < long_programs:
        _backward_segment(
            program, qkv_ptr, do_ptr, q_bias_ptr, v_bias_ptr, seed_ptr, dqkv_ptr, dq_bias_ptr, dv_bias_ptr,
            long_first, long_first * SHORT_N, long_queries, stride_qkv, stride_do, stride_dqkv, LONG_N, H, D,
            BLOCK_M, PREPARED, KEYS, CHUNKS, TAIL, LONG_HIDDEN, threshold,
        )  # fmt: skip
    else:
        _backward_segment(
            program - long_programs, qkv_ptr, do_ptr, q_bias_ptr, v_bias_ptr, seed_ptr, dqkv_ptr, dq_bias_ptr,
            dv_bias_ptr, short_first, short_first * LONG_N, short_queries, stride_qkv, stride_do, stride_dqkv,
            SHORT_N, H, D, BLOCK_M, PREPARED, KEYS, CHUNKS, TAIL, SHORT_HIDDEN, threshold,
        )  # fmt: skip


Segments = tuple[int, ...]  # sequences and tokens of the first segment, sequences and tokens of the second


class _Order(NamedTuple):
    """Tokens of the longer and the shorter segment, sequences of the longer one, those before each."""

    long: int
    short: int
    long_sequences: int
    long_first: int
    short_first: int


@functools.lru_cache(maxsize=256)
def _order(segments: Segments) -> _Order:
    sequences, tokens, others, other_tokens = segments
    if tokens >= other_tokens:
        return _Order(tokens, other_tokens, sequences, 0, sequences)
    return _Order(other_tokens, tokens, others, sequences, 0)


def pairs(
    segments: Segments, heads: int, dim: int, threshold: int, capability: tuple[int, int],
    multiprocessors: int, *, backward: bool,
) -> bool:  # fmt: skip
    """Whether self-attention of these segments (sequences and tokens of each in turn) is one launch.

    They are two, none is empty, their grids together are small, and kernels for both are compiled alike.
    Equal lengths have two launches: the compiler would merge both sides of the kernel and spill (257 tokens).
    """
    if len(segments) != 4 or 0 in segments or segments[1] == segments[3]:
        return False
    if (segments[0] + segments[2]) * heads > PAIRED_PROGRAMS * multiprocessors:
        return False
    long, short, *_ = _order(segments)
    if backward:
        return _backward_constants(long, short, dim, threshold, capability[0]) is not None
    return _forward_constants(long, short, dim, capability[0]) is not None


def forward_pair(
    qkv: Tensor, q_bias: Tensor | None, v_bias: Tensor | None, out: Tensor, normaliser: Tensor | None,
    heads: int, segments: Segments, threshold: int, seed: Tensor | None,
) -> None:  # fmt: skip
    """Write what `attention.forward` writes for each segment, where `pairs` says so.

    qkv (rows, 3 * H * d) and out (rows, H * d), last dimensions contiguous; `normaliser` has those of the
    longer segment, or of both in turn, or is None.
    """
    order, dim = _order(segments), out.shape[1] // heads
    constants = _forward_constants(order.long, order.short, dim, runtime.capability(qkv.device)[0])
    assert constants is not None, "see `pairs`"
    runtime.launch(
        attention_forward_pair, ((segments[0] + segments[2]) * heads,),
        qkv, q_bias, v_bias, seed, out, normaliser, order.long_sequences * heads, order.long_first,
        order.short_first, order.long - constants["LONG_REST"], order.short - constants["SHORT_REST"],
        stride_qkv=qkv.stride(0), stride_out=out.stride(0), H=heads, threshold=threshold,
        BOTH_KEPT=normaliser is not None and len(normaliser) == heads * len(out), **constants,
    )  # fmt: skip


def backward_pair(
    qkv: Tensor, d_out: Tensor, q_bias: Tensor | None, v_bias: Tensor | None, d_qkv: Tensor,
    dq_bias: Tensor | None, dv_bias: Tensor | None, heads: int, segments: Segments, threshold: int,
    seed: Tensor | None,
) -> None:  # fmt: skip
    """Write what `attention_backward.backward` writes for each segment, where `pairs` says so.

    d_out as `out`, d_qkv as `qkv` of `forward_pair`. dq_bias and dv_bias, (S, H * d) fp32 or both None, get
    the bias gradients of each sequence of both.
    """
    order, dim = _order(segments), d_out.shape[1] // heads
    major = runtime.capability(qkv.device)[0]
    constants = _backward_constants(order.long, order.short, dim, threshold, major)
    assert constants is not None, "see `pairs`"
    runtime.launch(
        attention_backward_pair, ((segments[0] + segments[2]) * heads,),
        qkv, d_out, q_bias, v_bias, seed, d_qkv, dq_bias, dv_bias, order.long_sequences * heads,
        order.long_first, order.short_first, order.long, order.short, stride_qkv=qkv.stride(0),
        stride_do=d_out.stride(0), stride_dqkv=d_qkv.stride(0), H=heads, **constants,
    )  # fmt: skip


def _forward_constants(long: int, short: int, dim: int, major: int) -> dict[str, Any] | None:
    """Of both segments' own launches; None where these differ in more than a kernel for both can."""
    return _forward_joined(long, short, dim, major, attention.BLOCKS)


@functools.cache
def _forward_joined(
    long: int, short: int, dim: int, major: int, blocks: attention.Blocks
) -> dict[str, Any] | None:
    both = [attention.constants_of(tokens, tokens, dim, major, blocks) for tokens in (long, short)]
    return _joined(both[0], both[1], ("N", "REST", "REST_BLOCK", "CHUNKS", "TAIL", "HIDDEN"))


def _backward_constants(long: int, short: int, dim: int, threshold: int, major: int) -> dict[str, Any] | None:
    """As `_forward_constants`; None too where a kernel for both would spill.

    So do heads of 64 beyond 64 tokens on Hopper (129 and 257: 8 bytes), before Hopper (50 and 52: 48 bytes),
    and with dropout on Blackwell (50 and 52: 8 bytes).
    """
    fits = dim < 64 or major == 9 or (major == 10 and threshold == 0)
    if attention_backward.prepares(long) or not fits:
        return None
    blocks = [attention_backward.blocks_for(tokens, dim, threshold, major) for tokens in (long, short)]
    return _backward_joined(long, short, dim, threshold, major, *blocks)


@functools.cache
def _backward_joined(
    long: int, short: int, dim: int, threshold: int, major: int,
    of_long: attention_backward.Blocks, of_short: attention_backward.Blocks,
) -> dict[str, Any] | None:  # fmt: skip
    both = [
        attention_backward.constants_of(tokens, tokens, dim, threshold, major, False, False, blocks)
        for tokens, blocks in ((long, of_long), (short, of_short))
    ]
    return _joined(both[0], both[1], ("N", "HIDDEN"))


def _joined(long: dict[str, Any], short: dict[str, Any], own: tuple[str, ...]) -> dict[str, Any] | None:
    """Constants that both share, and those that each has of its `own`; None where others differ."""
    shared = {name: value for name, value in long.items() if name not in (*own, "M", "CAUSAL")}
    if any(short[name] != value for name, value in shared.items()):
        return None
    sides = ("LONG", long), ("SHORT", short)
    return shared | {f"{side}_{name}": constants[name] for side, constants in sides for name in own}
