"""Bias-free linears: plain, several of one input, and one whose input is made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmim_fast.ops.products import convolves, in_dtype, matmul, weight_gradient, without_autocast
from lmim_fast.ops.transforms import by_autograd, ordinary, transformed


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype products run in: autocast's where it is on, else that of the weights."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def linear(x: Tensor, weight: Tensor, *, added: Tensor | None = None) -> Tensor:
    """x @ weight.T in x's dtype; the bias is added by the op that consumes the result.

    Args:
        x:      (..., D).
        weight: (F, D), cast to x's dtype.
        added:  (F,) a bias that is added here, without a gradient: the consumer gives it one.
    Returns:
        (..., F).
    """
    if not _records(x, weight):
        return matmul(x, in_dtype(weight, x.dtype), added)
    if weight.dtype == x.dtype and not convolves(x, weight):
        return matmul(x, weight, added)
    (product,) = _Linears.apply(x, [added], weight)  # the backward pass of a cast or a convolution costs more
    return product


def shared_input_linears(
    x: Tensor, weights: Sequence[Tensor], added: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """`linear` of x by each of several weights, whose gradients of x add up in the products that make them.

    Cheaper than one product by all weights: the gradients of its parts would be put together first.

    Args:
        x:       (..., D).
        weights: (F, D) each, cast to x's dtype; F may differ.
        added:   of each, as for `linear`.
    Returns:
        (..., F) for each weight.
    """
    added = [None] * len(weights) if added is None else added
    if not _records(x, *weights):
        pairs = zip(weights, added, strict=True)
        return [matmul(x, in_dtype(weight, x.dtype), bias) for weight, bias in pairs]
    products: tuple[Tensor, ...] = _Linears.apply(x, added, *weights)
    return list(products)


def _records(*tensors: Tensor) -> bool:
    """True if autograd records eager products of the tensors; a compiler differentiates the plain form."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return False
    return any(tensor.requires_grad for tensor in tensors)


def linear_recomputing(
    x: Tensor,
    weight: Tensor,
    recompute: Callable[..., Tensor],
    *sources: Tensor | None,
    added: Tensor | None = None,
) -> Tensor:
    """As `linear`, but keeps `sources` for the backward pass, which rebuilds x as recompute(*sources).

    Saves the memory of x when its sources are kept by other ops anyway. Under torch.compile the forward pass
    reads recompute(*sources) as well, and x is made only where something else needs it. (PyTorch 2.11 takes
    whatever it compiles for exported: there x is kept.)

    Args:
        x:         (..., D), equal to recompute(*sources).
        weight:    (F, D), cast to x's dtype.
        recompute: a function of tensors without state or randomness.
        added:     as for `linear`.
    Returns:
        (..., F).
    """
    if torch.compiler.is_exporting() or not torch.is_grad_enabled() or transformed():
        return matmul(x, in_dtype(weight, x.dtype), added)
    if torch.compiler.is_compiling():
        weight = weight.to(x.dtype)
        remade: Tensor = checkpoint(
            lambda weight, *sources: matmul(recompute(*sources), weight, added),
            weight,
            *sources,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return remade
    product: Tensor = _RecomputingLinear.apply(x, weight, added, recompute, *sources)
    return product


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Sequence[Tensor | None], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = [in_dtype(weight, x.dtype) for weight in weights]
        ctx.save_for_backward(x, *weights, *copies)
        return tuple([matmul(x, copy, bias) for copy, bias in zip(copies, added, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        originals, copies = saved[: len(grads)], saved[len(grads) :]
        needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]
        if not ordinary(*grads):
            of_x, *of_weights = by_autograd(_plain_products, (x, *originals), needed, grads)
            return of_x, None, *of_weights
        rows, of_x = x.reshape(-1, x.shape[-1]), None
        of_weights = [None] * len(grads)
        with without_autocast(x.device):
            for number, (grad, weight) in enumerate(zip(grads, copies, strict=True)):
                if grad is None:
                    continue
                grad = grad.reshape(-1, grad.shape[-1])
                if needed[0]:
                    of_x = grad @ weight if of_x is None else of_x.addmm_(grad, weight)
                if needed[1 + number]:
                    of_weights[number] = weight_gradient(grad, rows, originals[number].dtype)
        return None if of_x is None else of_x.view(x.shape), None, *of_weights


def _plain_products(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple([F.linear(x, weight.to(x.dtype)) for weight in weights])


class _RecomputingLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, added: Any, recompute: Callable[..., Tensor], *sources: Any
    ) -> Tensor:
        ctx.recompute, copy = recompute, in_dtype(weight, x.dtype)
        ctx.save_for_backward(weight, copy, *sources)
        return matmul(x, copy, added)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, copy, *sources = ctx.saved_tensors
        if not ordinary(grad):
            with torch.enable_grad(), without_autocast(grad.device):
                inputs = ctx.recompute(*sources), weight
            found = by_autograd(_plain_products, inputs, ctx.needs_input_grad[:2], (grad,))
            return *found, None, None, *(None for _ in sources)
        grad_weight = None
        with without_autocast(grad.device):
            grad_x = grad @ copy if ctx.needs_input_grad[0] else None
            if ctx.needs_input_grad[1]:
                x = ctx.recompute(*sources)
                rows = x.reshape(-1, x.shape[-1])
                grad_weight = weight_gradient(grad.reshape(-1, grad.shape[-1]), rows, weight.dtype)
        return grad_x, grad_weight, None, None, *(None for _ in sources)
