"""The norm of a sublayer: its kernels, what its backward pass keeps, gradients of what is behind it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmim_fast import kernels
from lmim_fast.ops.dropout import threshold
from lmim_fast.ops.products import weight_gradient

VARIABLE = "LMIM_FAST_ROWS"
FORMS = ("emit", "recompute")


def recomputes() -> bool:
    """The backward pass makes rows in passes of their own.

    Raises:
        ValueError: LMIM_FAST_ROWS is unknown.
    """
    form = os.environ.get(VARIABLE, "emit")
    if form not in FORMS:
        raise ValueError(f"unknown {VARIABLE} {form!r}; choose from {', '.join(FORMS)}")
    return form == "recompute"


class Norm(NamedTuple):
    """LayerNorm of residual + dropout(x + x_bias), or of the residual where x is None."""

    x: Tensor | None  # (M, D)
    x_bias: Tensor | None  # (D,)
    residual: Tensor  # (M, D)
    weight: Tensor  # (D,)
    bias: Tensor  # (D,)
    seed: Tensor | None
    p: float
    eps: float
    dtype: torch.dtype  # of the normalised rows


class Sums(NamedTuple):
    """What the backward pass of a norm needs."""

    total: Tensor
    weight: Tensor
    bias: Tensor
    statistics: Tensor
    seed: Tensor | None


def normalise(norm: Norm) -> tuple[Tensor, Sums]:
    """Normalised rows, and what the backward pass needs."""
    x, x_bias, residual, weight, bias, seed, p, eps, dtype = norm
    rows, total, statistics = kernels.norm.forward(
        x, x_bias, residual, weight, bias, seed, threshold(p), dtype, eps
    )
    return rows, Sums(residual if total is None else total, weight, bias, statistics, seed)


def keep(ctx: Any, norm: Norm) -> None:
    """Keep on `ctx` what else the backward pass asks of the norm."""
    ctx.p, ctx.eps, ctx.dtype = norm.p, norm.eps, norm.dtype
    ctx.x_dtype = None if norm.x is None else norm.x.dtype


def of_norm_linear(
    ctx: Any,
    sums: Sums,
    grad: Tensor | None,
    grad_total: Tensor | None,
    weight: Tensor,
    dtype: torch.dtype,
    needed: bool,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """Gradients of the first nine inputs, and of the weight (F, D), from that of norm @ weight.T (M, F)."""
    of_rows = rows = of_weight = None
    if grad is not None:
        if needed and recomputes():
            again = Norm(None, None, sums.total, sums.weight, sums.bias, None, 0.0, ctx.eps, ctx.dtype)
            of_weight = weight_gradient(grad, normalise(again)[0], dtype)
        of_rows = grad @ weight
        if needed and of_weight is None:
            rows = torch.empty_like(of_rows)
    of_inputs = of_norm(ctx, sums, of_rows, grad_total, rows)
    if rows is not None and grad is not None:
        of_weight = weight_gradient(grad, rows, dtype)
    return of_inputs, of_weight


def of_norm(
    ctx: Any,
    sums: Sums,
    grad: Tensor | None,
    grad_total: Tensor | None,
    rows: Tensor | None = None,
    *,
    extra: Sequence[Tensor] = (),
    first: int = 0,
) -> tuple[Tensor | None, ...]:
    """Gradients of the nine inputs of a norm from that of its rows; writes the rows again where asked to.

    Args:
        extra: more gradients of the rows, from token `first` on.
    """
    total, weight, bias, statistics, seed = sums
    x_wanted, x_bias_wanted, residual_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:5]
    parameters = grad is not None and (weight_wanted or bias_wanted)
    shared = x_wanted and ctx.p == 0 and ctx.x_dtype == total.dtype  # one tensor is both gradients
    of_x, of_residual, of_parameters = kernels.norm.backward(
        grad,
        grad_total,
        total,
        weight,
        statistics,
        seed,
        threshold(ctx.p),
        x_dtype=ctx.x_dtype if x_wanted and not shared else None,
        residual_dtype=total.dtype if residual_wanted or shared else None,
        parameters=parameters,
        x_bias=x_bias_wanted,
        rows=rows,
        bias=None if rows is None else bias,
        extra=extra,
        first=first,
    )
    return (
        (of_residual if shared else of_x) if x_wanted else None,
        of_parameters[-1] if x_bias_wanted else None,
        of_residual if residual_wanted else None,
        of_parameters[0] if parameters and weight_wanted else None,
        of_parameters[1] if parameters and bias_wanted else None,
        *(None,) * 4,
    )
