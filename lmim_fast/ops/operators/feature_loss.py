"""Masked losses by their kernels.

The gradients are made in the forward pass, which reads all they need; the backward pass only scales them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmim_fast import kernels
from lmim_fast.ops.operators.operator import cast, operator


def _fake(product: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, gradient, bias_gradient = arguments
    return (
        product.new_empty((), dtype=torch.float32),
        product.new_empty(product.shape if gradient else 0),
        product.new_empty(product.shape[2] if bias_gradient else 0, dtype=torch.float32),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    bias = inputs[1]
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.others = (None,) * (len(inputs) - 2)


def _differentiate(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    product_wanted, bias_wanted = ctx.needs_input_grad[:2]
    gradient, bias_gradient = ctx.saved_tensors
    gradient = masked_loss_gradient(gradient, upstream) if product_wanted else None
    grad_bias = cast(bias_gradient * upstream, ctx.bias_dtype) if bias_wanted else None
    return gradient, grad_bias, *ctx.others


@operator(_fake, _setup, _differentiate)
def masked_feature_loss(
    product: Tensor,
    bias: Tensor | None,
    features: Tensor,
    ids_masked: Tensor,
    eps: float,
    gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss; its gradients, that of product without its last factor, empty where they are not wanted."""
    loss, *gradients = kernels.feature_loss.features_forward(
        product, bias, features, ids_masked, eps, gradient=gradient, bias_gradient=bias_gradient
    )
    return loss, *_present(product, *gradients)


@operator(_fake, _setup, _differentiate)
def masked_pixel_loss(
    product: Tensor,
    bias: Tensor | None,
    images: Tensor,
    ids_masked: Tensor,
    patch_size: int,
    normalise: bool,
    gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `masked_feature_loss`."""
    loss, *gradients = kernels.feature_loss.pixels_forward(
        product,
        bias,
        images,
        ids_masked,
        patch_size,
        normalise=normalise,
        gradient=gradient,
        bias_gradient=bias_gradient,
    )
    return loss, *_present(product, *gradients)


def _present(product: Tensor, gradient: Tensor | None, bias_gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients, empty ones in place of None."""
    return (
        product.new_empty(0) if gradient is None else gradient,
        product.new_empty(0, dtype=torch.float32) if bias_gradient is None else bias_gradient,
    )


@operator(lambda gradient, upstream: torch.empty_like(gradient))
def masked_loss_gradient(gradient: Tensor, upstream: Tensor) -> Tensor:
    """The kept gradient of product, times all that is still to come."""
    scaled: Tensor = kernels.feature_loss.scale(gradient, upstream)
    return scaled
