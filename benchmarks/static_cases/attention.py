"""Cases of kernels/attention.py, kernels/attention_backward.py and kernels/attention_pair.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.shapes import BASE, DECODER, MASKED, MODELS, SMALL, TOKENS
from benchmarks.static_build import Case
from benchmarks.static_cases.common import BATCH, DTYPES, empty, named, seed_for
from lmim_fast.kernels import attention, attention_backward, attention_pair, runtime
from lmim_fast.ops.attention_reach import ALL_ON_CHIP, WIDTHS, reach
from lmim_fast.ops.dropout import threshold

# Lengths of other models with heads of 32 or 64, one for each way to cut queries and keys into tiles.
LENGTHS = (1, 25, 50, 64, 77, 128, 129, 197, 256)
RECOGNIZER_HEADS = 8


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for model in MODELS:
            for tokens in model.tokens:
                for p in model.dropouts:
                    name = f"self-attention {model.name} {tokens} {named(dtype)}, p={p}"
                    sizes = model.width, model.heads, tokens, tokens
                    yield name, partial(_attention, *sizes, dtype, p, packed=True)
        for queries in (MASKED, DECODER.tokens[0]):
            for p in DECODER.dropouts:
                name = f"cross-attention {DECODER.name} {queries} x {DECODER.tokens[0]} {named(dtype)}, p={p}"
                sizes = DECODER.width, DECODER.heads, queries, DECODER.tokens[0]
                yield name, partial(_attention, *sizes, dtype, p, packed=False)
    for tokens in (52, 257):
        for biases in ((False, False), (True, False), (False, True)):
            name = f"self-attention 6 heads of 64, {tokens} bfloat16, biases of queries and values {biases}"
            call = partial(_attention, 384, 6, tokens, tokens, torch.bfloat16, 0.0)
            yield name, partial(call, packed=True, biases=biases)
    for dim in WIDTHS:
        for p in DECODER.dropouts:
            for tokens in (*LENGTHS, *TOKENS):
                name = f"self-attention 4 heads of {dim}, {tokens} bfloat16, p={p}"
                yield name, partial(_attention, 4 * dim, 4, tokens, tokens, torch.bfloat16, p, packed=True)
            for queries, keys in ((1, 257), (25, 257), (257, 25), (257, 50), (25, 77)):
                name = f"cross-attention 4 heads of {dim}, {queries} x {keys} bfloat16, p={p}"
                yield name, partial(_attention, 4 * dim, 4, queries, keys, torch.bfloat16, p, packed=False)
    yield from _pair_cases()
    yield from _recognizer_cases()


def _pair_cases() -> Iterator[Case]:
    """Two segments: as many as the encoders' own, fewer, and one for each way to cut queries and keys."""
    for p in (0.0, 0.1):
        for dtype in DTYPES:
            for model in (SMALL, BASE):
                for tokens in (TOKENS, (25, 52)):
                    name = f"self-attention {model.name} {tokens[0]} + {tokens[1]} {named(dtype)}, p={p}"
                    yield name, partial(_pair, model.width, model.heads, tokens, dtype, p)
        for dim in WIDTHS:
            for tokens in ((64, 25), (52, 50), (52, 129), (77, 129), (256, 129), (256, 257), TOKENS):
                name = f"self-attention 4 heads of {dim}, {tokens[0]} + {tokens[1]} bfloat16, p={p}"
                yield name, partial(_pair, 4 * dim, 4, tokens, torch.bfloat16, p)


def _recognizer_cases() -> Iterator[Case]:
    """Causal attention over the tokens of a word, over an image, and of new tokens over a cache of keys."""
    for dtype in DTYPES:
        for dim in WIDTHS:
            width = RECOGNIZER_HEADS * dim
            for p in (0.0, 0.1):
                call = partial(_attention, width, RECOGNIZER_HEADS, dtype=dtype, p=p)
                end = f"{RECOGNIZER_HEADS} heads of {dim} {named(dtype)}, p={p}"
                for tokens in (1, 25, 40, 64):
                    name = f"causal self-attention {tokens}, {end}"
                    yield name, partial(call, tokens, tokens, packed=True, causal=True)
                for queries in (1, 25, 32):
                    for keys in (256, 257):
                        name = f"cross-attention {queries} x {keys}, {end}"
                        yield name, partial(call, queries, keys, packed=False)
                for queries, keys in ((1, 25), (1, 40), (25, 40), (70, 64)):
                    name = f"cross-attention with key lengths {queries} x {keys}, {end}"
                    yield name, partial(call, queries, keys, packed=False, lengths=True)


def _attention(
    width: int,
    heads: int,
    queries: int,
    keys: int,
    dtype: torch.dtype,
    p: float,
    *,
    packed: bool,
    biases: tuple[bool, bool] = (True, True),
    causal: bool = False,
    lengths: bool = False,
) -> str | None:
    """As the op lays it out: views of (B, N, 3D) where q, k and v are packed, else of (B, M, 2D).

    Says why where the op leaves these sizes to another backend.
    """
    largest = reach(runtime.capability(torch.device("meta")), width // heads, p, queries, keys)
    if keys > largest:
        return f"up to {largest} keys, got {keys}"
    if packed:
        parts = empty(BATCH, queries, 3 * width, dtype=dtype), empty(BATCH, queries, 3 * width, dtype=dtype)
        (q, k, v), (dq, dk, dv) = (part.split(width, dim=2) for part in parts)
    else:
        q, dq = (empty(BATCH, queries, width, dtype=dtype) for _ in range(2))
        parts = empty(BATCH, keys, 2 * width, dtype=dtype), empty(BATCH, keys, 2 * width, dtype=dtype)
        (k, v), (dk, dv) = (part.split(width, dim=2) for part in parts)
    out = empty(BATCH, queries, width, dtype=dtype)
    q_bias, v_bias = (empty(width) if given else None for given in biases)
    dropout = threshold(p), seed_for(p)
    first = BATCH if packed else 0  # sequences of the group before it
    normaliser = empty(BATCH * heads * queries) if keys > ALL_ON_CHIP else None
    masks = causal, empty(BATCH, dtype=torch.int64) if lengths else None
    attention.forward(q, k, v, q_bias, v_bias, out, normaliser, heads, *dropout, first, *masks)
    of_q, of_v = empty(2, BATCH, width).unbind() if any(biases) else (None, None)
    attention_backward.backward(
        q, k, v, out, out, normaliser, q_bias, v_bias, dq, dk, dv, of_q, of_v, heads, *dropout, first, *masks
    )
    return None


def _pair(width: int, heads: int, tokens: tuple[int, ...], dtype: torch.dtype, p: float) -> str | None:
    """Both segments in one launch where the kernels go so far and can be compiled for both."""
    capability, segments = runtime.capability(torch.device("meta")), (BATCH, tokens[0], BATCH, tokens[1])
    largest = min(reach(capability, width // heads, p, count, count) for count in tokens)
    if max(tokens) > largest:
        return f"up to {largest} keys, got {max(tokens)}"
    rows, dropout = BATCH * sum(tokens), threshold(p)
    qkv, out = empty(rows, 3 * width, dtype=dtype), empty(rows, width, dtype=dtype)
    q_bias, v_bias = empty(3 * width), empty(width)
    kept = sum(BATCH * count * heads for count in tokens if count > ALL_ON_CHIP)
    given = segments, heads, width // heads, dropout, capability, 2 * BATCH * heads
    refused = []
    if attention_pair.pairs(*given, backward=False):
        attention_pair.forward_pair(
            qkv, q_bias, v_bias, out, empty(kept) if kept else None, heads, segments, dropout, seed_for(p)
        )
    else:
        refused.append("the forward passes")
    if attention_pair.pairs(*given, backward=True):
        of_q, of_v = empty(2, 2 * BATCH, width).unbind()
        attention_pair.backward_pair(
            qkv, out, q_bias, v_bias, qkv, of_q, of_v, heads, segments, dropout, seed_for(p)
        )
    else:
        refused.append("the backward passes")
    return f"no one kernel for {' and '.join(refused)}" if refused else None
