"""Cases of kernels/norm.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.shapes import MODELS
from benchmarks.static_build import Case
from benchmarks.static_cases.common import BATCH, DTYPES, empty, named, seed_for
from lmim_fast.kernels import norm
from lmim_fast.ops.dropout import threshold

# What the backward kernel may do besides: write the normalised rows, add a second gradient of all or some.
EXTRAS = ((True, None), (False, 0), (True, 0), (False, 1), (True, 1))
NO_EXTRAS = (False, None)


def cases() -> Iterator[Case]:
    for model in MODELS:
        for dtype in DTYPES:
            for residual in (torch.float32, dtype):
                shape = BATCH, 257, model.width
                name = f"{model.name} {BATCH * 257}x{model.width} {named(dtype)}, residual {named(residual)}"
                for extras in (NO_EXTRAS, *EXTRAS):
                    told, arguments = _named(*extras), (shape, dtype, residual)
                    for p in model.dropouts:
                        call = partial(_add_norm, *arguments, p, *extras)
                        yield f"add + LayerNorm {name}, p={p}{told}", call
                    yield f"LayerNorm {name}{told}", partial(_norm, *arguments, *extras)


def _named(rows: bool, first: int | None) -> str:
    return (", rows" if rows else "") + ("" if first is None else f", more from {first}")


def _extras(out: torch.Tensor, parameter: torch.Tensor, rows: bool, first: int | None) -> dict[str, Any]:
    """Arguments of `norm.backward`."""
    made: dict[str, Any] = dict(rows=out, bias=parameter) if rows else {}
    return made if first is None else made | dict(extra=[out[:, first:]] * (2 if first else 1), first=first)


def _add_norm(
    shape: tuple[int, ...], dtype: torch.dtype, residual: torch.dtype, p: float, rows: bool, first: int | None
) -> None:
    x, stream, parameter = empty(*shape, dtype=dtype), empty(*shape, dtype=residual), empty(shape[-1])
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
        **_extras(x, parameter, rows, first),
    )


def _norm(
    shape: tuple[int, ...], dtype: torch.dtype, residual: torch.dtype, rows: bool, first: int | None
) -> None:
    stream, parameter = empty(*shape, dtype=residual), empty(shape[-1])
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
        **_extras(normalised, parameter, rows, first),
    )
