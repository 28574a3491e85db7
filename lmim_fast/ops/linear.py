"""Bias-free linears: plain, several of one input, and one whose input is made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmim_fast.ops.transforms import transformed


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype products run in: autocast's where it is on, else that of the weights."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in x's dtype; the bias is the business of the op that reads the product.

    Args:
        x:      (..., D).
        weight: (F, D), cast to x's dtype.
    Returns:
        (..., F).
    """
    weight = weight.to(x.dtype)
    if torch.is_grad_enabled() and _convolves(x, weight):
        (product,) = _SharedInputLinears.apply(x, weight)  # autograd of a convolution is slower than products
        return product
    return matmul(x, weight)


def shared_input_linears(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """`linear` of x by each of several weights, whose gradients of x add up in the products that make them.

    Cheaper than one product by all weights: the gradients of its parts would be put together first.

    Args:
        x:       (..., D).
        weights: (F, D) each, cast to x's dtype; F may differ.
    Returns:
        (..., F) for each weight.
    """
    weights = [weight.to(x.dtype) for weight in weights]
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return [matmul(x, weight) for weight in weights]
    products: tuple[Tensor, ...] = _SharedInputLinears.apply(x, *weights)
    return list(products)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in their own dtype, under autocast too. Differentiate `linear` instead.

    On a CPU large fp32 products run as convolutions of 1 x 1, which PyTorch gives to oneDNN while it gives
    linears to MKL: 5 to 20 % faster on an AMD EPYC with 2 threads, forward alone.
    """
    with torch.autocast(x.device.type, enabled=False):
        if not _convolves(x, weight):
            return F.linear(x, weight)
        image = x.view(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        rows = F.conv2d(image, weight[:, :, None, None]).permute(0, 2, 3, 1)
        # no view for autograd: the output of a function that is one could not be changed in place
        product: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], len(weight)])
        return product


def _convolves(x: Tensor, weight: Tensor) -> bool:
    """The product runs as a convolution: where that is faster, and PyTorch has oneDNN for it."""
    if torch.compiler.is_compiling() or transformed():
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
        return False
    large = min(weight.shape) >= 128 and x.numel() >= 256 * x.shape[-1]
    onednn = torch.backends.mkldnn
    return large and torch.get_num_threads() > 1 and onednn.is_available() and bool(onednn.enabled)


def linear_recomputing(
    x: Tensor, weight: Tensor, recompute: Callable[..., Tensor], *sources: Tensor | None
) -> Tensor:
    """As `linear`, but keeps `sources` for the backward pass, which rebuilds x as recompute(*sources).

    Saves the memory of x when its sources are kept by other ops anyway. Under torch.compile the forward pass
    reads recompute(*sources) as well, and x is made only where something else needs it. (PyTorch 2.11 takes
    whatever it compiles for exported: there x is kept.)

    Args:
        x:         (..., D), equal to recompute(*sources).
        weight:    (F, D), cast to x's dtype.
        recompute: a function of tensors without state or randomness.
    Returns:
        (..., F).
    """
    weight = weight.to(x.dtype)
    if torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return matmul(x, weight)
    if torch.compiler.is_compiling():
        remade: Tensor = checkpoint(
            lambda weight, *sources: matmul(recompute(*sources), weight),
            weight,
            *sources,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return remade
    product: Tensor = _RecomputingLinear.apply(x, weight, recompute, *sources)
    return product


class _SharedInputLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)
        return tuple(matmul(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows, of_x = x.reshape(-1, x.shape[-1]), None
        of_weights: list[Tensor | None] = [None] * len(weights)
        with torch.autocast(x.device.type, enabled=False):
            for number, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
                if grad is None:
                    continue
                grad = grad.reshape(-1, grad.shape[-1])
                if ctx.needs_input_grad[0]:
                    of_x = grad @ weight if of_x is None else of_x.addmm_(grad, weight)
                if ctx.needs_input_grad[1 + number]:
                    of_weights[number] = grad.T @ rows
        return None if of_x is None else of_x.view(x.shape), *of_weights


class _RecomputingLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, recompute: Callable[..., Tensor], *sources: Any
    ) -> Tensor:
        ctx.recompute = recompute
        ctx.save_for_backward(weight, *sources)
        return matmul(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            x = ctx.recompute(*sources)
            grad_weight = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return grad_x, grad_weight, None, *(None for _ in sources)
