"""Cases of kernels/norm.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.shapes import MODELS
from benchmarks.static_build import Case
from benchmarks.static_cases.common import BATCH, DTYPES, empty, named, seed_for
from lmim_fast.kernels import norm
from lmim_fast.ops.dropout import threshold


def cases() -> Iterator[Case]:
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
