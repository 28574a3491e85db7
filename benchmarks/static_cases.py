"""The shipped kernel configurations: launch functions called on meta tensors at the sizes of the models.

One function a kernel module; each yields (what is computed, a call). `benchmarks/static.py` records what the
calls launch and compiles it. Batch 64, so that strides and row counts are as large as in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from lmim_fast.kernels import attention, attention_backward, gelu, linear_gelu, norm, runtime
from torch import Tensor

from benchmarks.shapes import DECODER, MASKED, MODELS
from benchmarks.static_build import Case
from lmim_fast.ops.attention_kernels import ALL_ON_CHIP, reach
from lmim_fast.ops.dropout import threshold

BATCH = 64
DTYPES = (torch.bfloat16, torch.float16)


def cases() -> Iterator[Case]:
    """All of them."""
    yield from norm_cases()
    yield from gelu_cases()
    yield from linear_gelu_cases()
    yield from attention_cases()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def seed_for(p: float) -> Tensor | None:
    return empty(1, dtype=torch.int64) if p else None


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def norm_cases() -> Iterator[Case]:
    rows = BATCH * 257
    for model in MODELS:
        for dtype in DTYPES:
            for residual in (torch.float32, dtype):
                name = f"{model.name} {rows}x{model.width} {named(dtype)}, residual {named(residual)}"
                for p in model.dropouts:
                    arguments = rows, model.width, dtype, residual, p
                    yield f"add + LayerNorm {name}, p={p}", partial(_add_norm, *arguments)
                yield f"LayerNorm {name}", partial(_norm, rows, model.width, dtype, residual)


def _add_norm(rows: int, width: int, dtype: torch.dtype, residual: torch.dtype, p: float) -> None:
    x, stream, parameter = empty(rows, width, dtype=dtype), empty(rows, width, dtype=residual), empty(width)
    dropout = seed_for(p), threshold(p)
    _, total, statistics = norm.forward(x, parameter, stream, parameter, parameter, *dropout, dtype, 1e-6)
    assert total is not None
    norm.backward(
        x,
        total,
        total,
        parameter,
        statistics,
        *dropout,
        x_dtype=dtype if p or dtype != residual else None,
        residual_dtype=residual,
        parameters=True,
        x_bias=True,
    )


def _norm(rows: int, width: int, dtype: torch.dtype, residual: torch.dtype) -> None:
    stream, parameter = empty(rows, width, dtype=residual), empty(width)
    normalised, _, statistics = norm.forward(None, None, stream, parameter, parameter, None, 0, dtype, 1e-6)
    norm.backward(
        normalised,
        None,
        stream,
        parameter,
        statistics,
        None,
        0,
        x_dtype=None,
        residual_dtype=residual,
        parameters=True,
        x_bias=False,
    )


def gelu_cases() -> Iterator[Case]:
    rows = BATCH * 257
    for model in MODELS:
        for dtype in DTYPES:
            for p in model.dropouts:
                name = f"GELU {model.name} {rows}x{model.hidden} {named(dtype)}, p={p}"
                yield name, partial(_gelu, rows, model.hidden, dtype, p)


def _gelu(rows: int, width: int, dtype: torch.dtype, p: float) -> None:
    x, bias, dropout = empty(rows, width, dtype=dtype), empty(width), (seed_for(p), threshold(p))
    gelu.forward(x, bias, *dropout)
    gelu.backward(x, x, bias, *dropout, bias_wanted=True)


def linear_gelu_cases() -> Iterator[Case]:
    rows = BATCH * 257
    for model in MODELS:
        for dtype in DTYPES:
            name = f"linear + GELU {model.name} {rows}x{model.width} to {model.hidden} {named(dtype)}"
            yield name, partial(_linear_gelu, rows, model.width, model.hidden, dtype)


def _linear_gelu(rows: int, width: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight = empty(rows, width, dtype=dtype), empty(hidden, width, dtype=dtype)
    for keep_hidden in (False, True):
        linear_gelu.forward(x, weight, empty(hidden), keep_hidden=keep_hidden)
    kept, through = empty(rows, hidden, dtype=dtype), empty(width, hidden, dtype=dtype)
    linear_gelu.backward(x, through, kept, activated_wanted=True, bias_wanted=True)


def attention_cases() -> Iterator[Case]:
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
    for dim in (16, 48, 64, 96, 128):  # heads of other models
        for tokens in (16, 64, 128, 512):
            for p in DECODER.dropouts:
                name = f"self-attention 4 heads of {dim}, {tokens} bfloat16, p={p}"
                yield name, partial(_attention, 4 * dim, 4, tokens, tokens, torch.bfloat16, p, packed=True)


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
) -> str | None:
    """As the op lays it out: views of (B, N, 3D) where q, k and v are packed, else of (B, M, 2D).

    Says why where the op leaves these sizes to another backend.
    """
    largest = reach(runtime.capability(torch.device("meta")), width // heads, p)
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
    attention.forward(q, k, v, q_bias, v_bias, out, normaliser, heads, *dropout, first)
    count = BATCH * attention_backward.parts(keys, width // heads)
    of_bias = empty(2, count, width).unbind() if any(biases) else (None, None)
    gradients = dq, dk, dv, *of_bias
    attention_backward.backward(
        q, k, v, out, out, normaliser, q_bias, v_bias, *gradients, heads, *dropout, first
    )
    return None
