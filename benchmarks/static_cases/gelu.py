"""Cases of kernels/gelu.py and kernels/linear_gelu.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.shapes import MODELS
from benchmarks.static_build import Case
from benchmarks.static_cases.common import BATCH, DTYPES, empty, named, seed_for
from lmim_fast.kernels import gelu, linear_gelu
from lmim_fast.ops.dropout import threshold


def cases() -> Iterator[Case]:
    yield from _gelu_cases()
    yield from _linear_gelu_cases()


def _gelu_cases() -> Iterator[Case]:
    rows = BATCH * 257
    for model in MODELS:
        for dtype in DTYPES:
            for p in model.dropouts:
                name = f"GELU {model.name} {rows}x{model.hidden} {named(dtype)}, p={p}"
                yield name, partial(_gelu, rows, model.hidden, dtype, p)


def _gelu(rows: int, width: int, dtype: torch.dtype, p: float) -> None:
    x, bias, dropout = empty(rows, width, dtype=dtype), empty(width), (seed_for(p), threshold(p))
    gelu.forward(x, bias, *dropout)
    for activated in (None, x):
        gelu.backward(x, x, bias, *dropout, bias_wanted=True, activated=activated)


def _linear_gelu_cases() -> Iterator[Case]:
    rows = BATCH * 257
    for model in MODELS:
        for dtype in DTYPES:
            name = f"linear + GELU {model.name} {rows}x{model.width} to {model.hidden} {named(dtype)}"
            yield name, partial(_linear_gelu, rows, model.width, model.hidden, dtype)
    for width, hidden in ((96, 384), (48, 200)):  # smaller tiles
        name = f"linear + GELU {rows}x{width} to {hidden} bfloat16"
        yield name, partial(_linear_gelu, rows, width, hidden, torch.bfloat16)


def _linear_gelu(rows: int, width: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight = empty(rows, width, dtype=dtype), empty(hidden, width, dtype=dtype)
    for keep_hidden in (False, True):
        linear_gelu.forward(x, weight, empty(hidden), keep_hidden=keep_hidden)
    kept, through = empty(rows, hidden, dtype=dtype), empty(width, hidden, dtype=dtype)
    linear_gelu.backward(x, through, kept, activated_wanted=True, bias_wanted=True)
