"""Norm and linear, and norm and MLP, by kernels in one step of autograd each.

The backward pass keeps the residual stream and the hidden rows alone. Its kernels write the normalised and
the activated rows again while they make gradients of them, for the gradients of the weights behind. With
LMIM_FAST_ROWS=recompute passes of their own make these rows, so that fewer tensors exist at a time: more
traffic, less memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast import kernels
from lmim_fast.ops.dropout import threshold
from lmim_fast.ops.norm_step import (
    Norm,
    Sums,
    keep,
    normalise,
    of_norm,
    of_norm_linear,
    recomputes,
)
from lmim_fast.ops.operators.operator import backward_of, differentiable
from lmim_fast.ops.products import in_dtype, matmul, weight_gradient, without_autocast


def norm_linear(norm: Norm, weight: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """norm @ weight.T + added (M, F), and the new residual (M, D); `added` as for `linear`."""
    if differentiable(*norm, weight):
        product, total = _NormLinear.apply(*norm, weight, added)
        return product, total
    rows, sums = normalise(norm)
    return matmul(rows, in_dtype(weight, norm.dtype), added), sums.total


def shared_norm(norm: Norm, first: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """The normalised rows, as `DropoutAddLayerNorm.shared` returns them; only here norm is of (B, N, D)."""
    if not differentiable(*norm):
        rows = normalise(norm)[0]
        chosen = rows[:, first:].contiguous() if first else rows
        return rows, chosen if first else None, chosen
    rows, chosen, again = _SharedNorm.apply(*norm, first)
    return rows, chosen, again


def norm_mlp(
    norm: Norm,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    *,
    seed: Tensor | None = None,
    p: float = 0.0,
    epilogue: bool = False,
) -> tuple[Tensor, Tensor]:
    """`mlp` of the norm (M, D2), and the new residual (M, D).

    Args:
        seed, p:  of the dropout of hidden rows.
        epilogue: GELU in the epilogues of the products; p is 0.
    """
    hidden = weight1, bias1, weight2, seed, p, epilogue
    if differentiable(*norm, weight1, bias1, weight2):
        product, total = _NormMlp.apply(*norm, *hidden)
        return product, total
    rows, sums = normalise(norm)
    return _mlp(rows, *hidden)[0], sums.total


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    *,
    seed: Tensor | None = None,
    p: float = 0.0,
    epilogue: bool = False,
) -> Tensor:
    """`ops.mlp.mlp` of x (M, D); the rest is as for `norm_mlp`."""
    if differentiable(x, weight1, bias1, weight2):
        product: Tensor = _Mlp.apply(x, weight1, bias1, weight2, seed, p, epilogue)
        return product
    return _mlp(x, weight1, bias1, weight2, seed, p, epilogue)[0]


class _SharedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        norm, ctx.first = Norm(*inputs[:-1]), inputs[-1]
        rows, sums = normalise(norm)
        keep(ctx, norm)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*sums)
        if not ctx.first:
            return rows, None, rows.view_as(rows)
        chosen = rows[:, ctx.first :].contiguous()
        return rows, chosen, chosen.view_as(chosen)

    @staticmethod
    @backward_of
    def backward(ctx: Any, grad: Tensor | None, *more: Tensor | None) -> tuple[Tensor | None, ...]:
        extra = [tensor for tensor in more if tensor is not None]
        if grad is None and extra and not ctx.first:
            grad = extra.pop()
        if grad is None and not extra:
            return (None,) * 10
        sums = Sums(*ctx.saved_tensors)
        if grad is None:
            grad = torch.zeros_like(sums.total, dtype=ctx.dtype)
        return *of_norm(ctx, sums, grad, None, extra=extra, first=ctx.first), None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        norm, weight, added = Norm(*inputs[:-2]), *inputs[-2:]
        rows, sums = normalise(norm)
        copy = in_dtype(weight, norm.dtype)
        keep(ctx, norm)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*sums, copy)
        ctx.weight_dtype = weight.dtype
        return matmul(rows, copy, added), sums.total

    @staticmethod
    @backward_of
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None and grad_total is None:
            return (None,) * 11
        *saved, copy = ctx.saved_tensors
        with without_autocast(copy.device):
            needed = ctx.needs_input_grad[9]
            of_inputs, weight = of_norm_linear(
                ctx, Sums(*saved), grad, grad_total, copy, ctx.weight_dtype, needed
            )
        return *of_inputs, weight, None


class _Hidden(NamedTuple):
    """What the backward pass of an MLP needs."""

    hidden: Tensor
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    seed: Tensor | None


def _mlp(
    rows: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    seed: Tensor | None,
    p: float,
    epilogue: bool,
    *,
    keep_hidden: bool = False,
) -> tuple[Tensor, _Hidden]:
    """Product, and what the backward pass needs where hidden rows are to be kept."""
    copy1, copy2 = in_dtype(weight1, rows.dtype), in_dtype(weight2, rows.dtype)
    if epilogue:
        hidden, activated = kernels.linear_gelu.forward(rows, copy1, bias1, keep_hidden=keep_hidden)
    else:
        hidden = matmul(rows, copy1)
        activated = kernels.gelu.forward(hidden, bias1, seed, threshold(p))
    return matmul(activated, copy2), _Hidden(hidden, copy1, bias1, copy2, seed)


def _keep_mlp(
    ctx: Any, weight1: Tensor, bias1: Tensor, weight2: Tensor, seed: object, p: float, epilogue: bool
) -> None:
    ctx.hidden_p, ctx.epilogue, ctx.weight_dtypes = p, epilogue, (weight1.dtype, weight2.dtype)


def _of_hidden(
    ctx: Any, saved: _Hidden, grad: Tensor, first: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the hidden rows, of bias1 and weight2; `first` is the number of the input weight1."""
    hidden, _, bias1, weight2, seed = saved
    _, bias_wanted, weight_wanted = ctx.needs_input_grad[first : first + 3]
    dtype, dropped, of_weight, activated = ctx.weight_dtypes[1], threshold(ctx.hidden_p), None, None
    if ctx.epilogue:
        of_hidden, activated, of_bias = kernels.linear_gelu.backward(
            grad, weight2, hidden, activated_wanted=weight_wanted, bias_wanted=bias_wanted
        )
    else:
        if weight_wanted and recomputes():
            of_weight = _of_weight2(ctx, saved, grad)
        elif weight_wanted:
            activated = torch.empty_like(hidden)
        of_activated = grad @ weight2
        of_hidden, of_bias = kernels.gelu.backward(
            *(of_activated, hidden, bias1, seed, dropped),
            bias_wanted=bias_wanted,
            activated=activated,
            in_place=True,
        )
    if activated is not None:
        of_weight = weight_gradient(grad, activated, dtype)
    return of_hidden, of_bias, of_weight


def _of_weight2(ctx: Any, saved: _Hidden, grad: Tensor) -> Tensor:
    """Gradient of weight2 from activated rows that a pass of its own makes."""
    hidden, bias1, seed = saved.hidden, saved.bias1, saved.seed
    if ctx.epilogue:  # then they have their bias
        return weight_gradient(grad, F.gelu(hidden), ctx.weight_dtypes[1])
    activated = kernels.gelu.forward(hidden, bias1, seed, threshold(ctx.hidden_p))
    return weight_gradient(grad, activated, ctx.weight_dtypes[1])


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        norm = Norm(*inputs[:9])
        rows, sums = normalise(norm)
        product, hidden = _mlp(rows, *inputs[9:], keep_hidden=True)
        keep(ctx, norm)
        _keep_mlp(ctx, *inputs[9:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*sums, *hidden)
        return product, sums.total

    @staticmethod
    @backward_of
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None and grad_total is None:
            return (None,) * 15
        saved = ctx.saved_tensors
        sums, hidden = Sums(*saved[:5]), _Hidden(*saved[5:])
        of_hidden = of_bias = of_weight2 = None
        with without_autocast(hidden.hidden.device):
            if grad is not None:
                of_hidden, of_bias, of_weight2 = _of_hidden(ctx, hidden, grad.contiguous(), 9)
            dtype, needed = ctx.weight_dtypes[0], ctx.needs_input_grad[9]
            of_inputs, of_weight1 = of_norm_linear(
                ctx, sums, of_hidden, grad_total, hidden.weight1, dtype, needed
            )
        return *of_inputs, of_weight1, of_bias, of_weight2, None, None, None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Tensor:
        product, hidden = _mlp(x, *inputs, keep_hidden=True)
        _keep_mlp(ctx, *inputs)
        ctx.save_for_backward(x, *hidden)
        return product

    @staticmethod
    @backward_of
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        hidden = _Hidden(*saved)
        with without_autocast(x.device):
            if not any(ctx.needs_input_grad[:3]):
                return None, None, None, _of_weight2(ctx, hidden, grad), None, None, None
            of_hidden, of_bias, of_weight2 = _of_hidden(ctx, hidden, grad.contiguous(), 1)
            of_weight1 = (
                weight_gradient(of_hidden, x, ctx.weight_dtypes[0]) if ctx.needs_input_grad[1] else None
            )
            of_x = of_hidden @ hidden.weight1 if ctx.needs_input_grad[0] else None
        return of_x, of_weight1, of_bias, of_weight2, None, None, None
