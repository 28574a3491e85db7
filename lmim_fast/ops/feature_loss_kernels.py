"""Masked losses by their kernels: what torch and autograd have to know of them.

The gradients are made in the forward pass, which reads all they need; the backward pass only scales them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("lmim_fast::masked_feature_loss", mutates_args=())
def _features(
    product: Tensor,
    bias: Tensor | None,
    features: Tensor,
    ids_masked: Tensor,
    eps: float,
    gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss; its gradients, that of product without its last factor, empty where they are not wanted."""
    from lmim_fast.kernels import feature_loss

    loss, *gradients = feature_loss.features_forward(
        product, bias, features, ids_masked, eps, gradient=gradient, bias_gradient=bias_gradient
    )
    return loss, *_present(product, *gradients)


@_features.register_fake
def _(product, bias, features, ids_masked, eps, gradient, bias_gradient):  # type: ignore[no-untyped-def]
    return _results_like(product, gradient, bias_gradient)


@torch.library.custom_op("lmim_fast::masked_pixel_loss", mutates_args=())
def _pixels(
    product: Tensor,
    bias: Tensor | None,
    images: Tensor,
    ids_masked: Tensor,
    patch_size: int,
    normalise: bool,
    gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_features`."""
    from lmim_fast.kernels import feature_loss

    loss, *gradients = feature_loss.pixels_forward(
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


@_pixels.register_fake
def _(  # type: ignore[no-untyped-def]
    product, bias, images, ids_masked, patch_size, normalise, gradient, bias_gradient
):
    return _results_like(product, gradient, bias_gradient)


def _present(product: Tensor, gradient: Tensor | None, bias_gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients, empty ones in place of None."""
    return (
        product.new_empty(0) if gradient is None else gradient,
        product.new_empty(0, dtype=torch.float32) if bias_gradient is None else bias_gradient,
    )


def _results_like(product: Tensor, gradient: bool, bias_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    single = torch.float32
    return (
        product.new_empty((), dtype=single),
        product.new_empty(product.shape if gradient else 0),
        product.new_empty(product.shape[2] if bias_gradient else 0, dtype=single),
    )


@torch.library.custom_op("lmim_fast::masked_loss_gradient", mutates_args=())
def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """The kept gradient of product, times all that is still to come."""
    from lmim_fast.kernels import feature_loss

    factor = feature_loss.pending_factor(gradient)
    return feature_loss.scale(gradient, upstream, factor, in_place=False)


@_scaled.register_fake
def _(gradient, upstream):  # type: ignore[no-untyped-def]
    return torch.empty_like(gradient)


@torch.library.custom_op("lmim_fast::masked_loss_gradient_", mutates_args=("gradient",))
def _scale_in_place(gradient: Tensor, upstream: Tensor) -> None:
    """gradient x upstream; where upstream is 1 the tensor is neither read nor written."""
    from lmim_fast.kernels import feature_loss

    feature_loss.scale(gradient, upstream, 1.0, in_place=True)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    bias = inputs[1]
    _, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.num_inputs = len(inputs)


def _differentiate(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * ctx.num_inputs
    product_wanted, bias_wanted = ctx.needs_input_grad[:2]
    gradient, bias_gradient = ctx.saved_tensors
    if not product_wanted:
        gradient = None
    elif gradient.dtype == torch.float16 or _read_again(gradient):
        gradient = _scaled(gradient, upstream)
    else:
        _scale_in_place(gradient, upstream)
    grad_bias = (bias_gradient * upstream).to(ctx.bias_dtype) if bias_wanted else None
    return gradient, grad_bias, *(None,) * (ctx.num_inputs - 2)


def _read_again(saved: Tensor) -> bool:
    """False where this backward pass is the last to read a saved tensor, and so may overwrite it.

    A tensor that is traced is not a plain one. PyTorch has no public way to ask for `retain_graph`.
    """
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return type(saved) is not Tensor or keeps_graph is None or keeps_graph()


_features.register_autograd(_differentiate, setup_context=_setup_context)
_pixels.register_autograd(_differentiate, setup_context=_setup_context)


def launch_features(
    product: Tensor, bias: Tensor | None, features: Tensor, ids_masked: Tensor, eps: float
) -> Tensor:
    """`masked_feature_loss` by its kernel."""
    loss: Tensor = _features(product, bias, features, ids_masked, eps, *_wanted(product, bias))[0]
    return loss


def launch_pixels(
    product: Tensor, bias: Tensor | None, images: Tensor, ids_masked: Tensor, patch_size: int, normalise: bool
) -> Tensor:
    """`masked_pixel_loss` by its kernel."""
    wanted = _wanted(product, bias)
    loss: Tensor = _pixels(product, bias, images, ids_masked, patch_size, normalise, *wanted)[0]
    return loss


def _wanted(*tensors: Tensor | None) -> list[bool]:
    """Which of them want a gradient."""
    recording = torch.is_grad_enabled()
    return [recording and tensor is not None and tensor.requires_grad for tensor in tensors]
