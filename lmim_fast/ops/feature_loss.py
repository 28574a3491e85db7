"""Masked reconstruction losses: only the rows that are masked are read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops import dispatch
from lmim_fast.ops.masking import gather_rows
from lmim_fast.ops.operators import feature_loss as operators
from lmim_fast.ops.patch_embed import image_size, normalise_images, split_patches

_MAX_WIDTH = 2048  # wider rows do not fit the registers of a program


def masked_feature_loss(
    product: Tensor, bias: Tensor | None, features: Tensor, ids_masked: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """Mean squared error of product + bias against the normalised teacher features of the masked patches.

    Args:
        product:    (B, M, D) prediction without its bias, fp32 | bf16 | fp16.
        bias:       (D,) of the linear that made it, or None; its gradient comes out of this op.
        features:   (B, 1 + L, D) teacher output, cls first, any float dtype; gets no gradient.
        ids_masked: (B, M) int64 patches, in [0, L).
        eps:        added to the variance.
    Returns:
        () fp32, the mean over all B x M x D; the target is `masked_feature_target`'s.
    Raises:
        ValueError: the shapes do not fit each other, B or M is 0, an input is of another type, or inputs are
            on several devices.
    Source: LMIM's released loss.
    """
    _check(product, bias, ids_masked)
    if features.dim() != 3 or (features.shape[0], features.shape[2]) != (product.shape[0], product.shape[2]):
        raise ValueError(
            f"features {tuple(features.shape)} must be ({product.shape[0]}, 1+L, {product.shape[2]}) "
            f"for product {tuple(product.shape)}"
        )
    if not features.is_floating_point():
        raise ValueError(f"features must be floating-point, got {features.dtype}")
    dispatch.same_device(product=product, bias=bias, features=features, ids_masked=ids_masked)
    features = features.detach()
    if not dispatch.takes("masked_feature_loss", (product, bias, features), _refuses(product)):
        return masked_mse(_predict(product, bias), masked_feature_target(features, ids_masked, eps=eps))
    wanted = _wants_gradient(product), _wants_gradient(bias)
    loss: Tensor = operators.masked_feature_loss(product, bias, features, ids_masked, eps, *wanted)[0]
    return loss


def masked_pixel_loss(
    product: Tensor,
    bias: Tensor | None,
    images: Tensor,
    ids_masked: Tensor,
    patch_size: int,
    *,
    normalise: bool,
) -> Tensor:
    """Mean squared error of product + bias against the pixels of the masked patches.

    Args:
        product:    (B, M, 3 * patch_size^2) prediction without its bias, fp32 | bf16 | fp16.
        bias:       (3 * patch_size^2,) of its linear, or None; its gradient comes out of this op.
        images:     float (B, 3, height, width) in [-1, 1] or uint8 (B, height, width, 3); gets no gradient.
        ids_masked: (B, M) int64 patches, in [0, L).
        patch_size: side in pixels.
        normalise:  each patch to mean 0 and unbiased variance 1 (eps 1e-6).
    Returns:
        () fp32, the mean over all B x M x 3 x patch_size^2; the target is `masked_pixel_target`'s.
    Raises:
        ValueError: the shapes do not fit each other, B or M is 0, an input is of another type, or inputs are
            on several devices.
    Source: MAE's loss, with norm_pix_loss.
    """
    _check(product, bias, ids_masked)
    if len(images) != len(product):
        raise ValueError(
            f"product is of {len(product)} images, images {tuple(images.shape)} of {len(images)}"
        )
    height, width = image_size(images)
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"images {tuple(images.shape)} do not split into patches of {patch_size} pixels")
    if product.shape[2] != 3 * patch_size**2:
        raise ValueError(
            f"product {tuple(product.shape)} must be (B, M, {3 * patch_size**2}) for patch_size {patch_size}"
        )
    dispatch.same_device(product=product, bias=bias, images=images, ids_masked=ids_masked)
    images = images.detach()
    if not dispatch.takes("masked_pixel_loss", (product, bias, images), _refuses(product)):
        target = masked_pixel_target(images, ids_masked, patch_size, normalise=normalise)
        return masked_mse(_predict(product, bias), target)
    wanted = _wants_gradient(product), _wants_gradient(bias)
    loss: Tensor = operators.masked_pixel_loss(
        product, bias, images, ids_masked, patch_size, normalise, *wanted
    )[0]
    return loss


def masked_feature_target(features: Tensor, ids_masked: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Teacher features at the masked patches, each normalised over its features without affine.

    Args:
        features:   (B, 1 + L, D) teacher output, cls first.
        ids_masked: (B, M).
        eps:        added to the variance.
    Returns:
        (B, M, D) float32 (float64 of float64), without gradient.
    Source: LMIM's released target.
    """
    rows = gather_rows(features.detach(), ids_masked + 1)
    return F.layer_norm(_full(rows), rows.shape[-1:], eps=eps)


def masked_pixel_target(images: Tensor, ids_masked: Tensor, patch_size: int, *, normalise: bool) -> Tensor:
    """Pixels of the masked patches, ordered patch row, patch column, colour.

    Args:
        images:     as `normalise_images` takes them.
        ids_masked: (B, M).
        patch_size: side in pixels.
        normalise:  each patch to mean 0 and unbiased variance 1 (eps 1e-6).
    Returns:
        (B, M, 3 * patch_size^2) float32 (float64 of float64).
    Source: MAE's norm_pix_loss.
    """
    patches = split_patches(_full(normalise_images(images)), patch_size)  # (B, L, 3, row, column)
    pixels = gather_rows(patches.permute(0, 1, 3, 4, 2).flatten(2), ids_masked)
    if not normalise:
        return pixels
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return (pixels - mean) * (variance + 1e-6).rsqrt()


def masked_mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all masked patches of the batch, in fp32 (in fp64 where pred is).

    Args:
        pred:   (B, M, F) any float dtype.
        target: (B, M, F).
    Raises:
        ValueError: shapes differ (broadcasting would give a wrong loss).
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must have one shape")
    full = _full(pred)
    return F.mse_loss(full, target.to(full.dtype))


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check(product: Tensor, bias: Tensor | None, ids_masked: Tensor) -> None:
    """Raise ValueError unless product is a prediction for the patches `ids_masked`, and bias fits it."""
    if product.dim() != 3 or not product.is_floating_point():
        raise ValueError(f"product must be float (B, M, D), got {product.dtype} of {tuple(product.shape)}")
    if 0 in product.shape:
        raise ValueError(f"the mean over product {tuple(product.shape)} needs at least one masked patch")
    if ids_masked.shape != product.shape[:2] or ids_masked.dtype != torch.int64:
        raise ValueError(
            f"ids_masked must be int64 {tuple(product.shape[:2])} for product {tuple(product.shape)}, "
            f"got {ids_masked.dtype} of {tuple(ids_masked.shape)}"
        )
    if bias is not None and (bias.shape != product.shape[2:] or not bias.is_floating_point()):
        raise ValueError(f"bias must be float ({product.shape[2]},), got {bias.dtype} of {tuple(bias.shape)}")


def _predict(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias.to(product.dtype)


def _wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _refuses(product: Tensor) -> str | None:
    width = product.shape[2]
    return None if width <= _MAX_WIDTH else f"takes rows of at most {_MAX_WIDTH} values, got {width}"
