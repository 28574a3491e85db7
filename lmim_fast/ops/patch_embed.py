"""Patch embedding of all patches or of the kept ones only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmim_fast.ops import dispatch
from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.masking import gather_rows
from lmim_fast.ops.operators import patch_embed as operators

View = operators.View


def normalise_images(images: Tensor) -> Tensor:
    """uint8 (B, height, width, 3) to fp32 (B, 3, height, width) in [-1, 1]; float images pass.

    Raises:
        ValueError: neither of the two layouts.
    """
    image_size(images)
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0 if images.dtype == torch.uint8 else images


def image_size(images: Tensor) -> tuple[int, int]:
    """Height and width; raises ValueError for another layout than the two of `normalise_images`."""
    if images.dtype == torch.uint8 and images.dim() == 4 and images.shape[3] == 3:
        return images.shape[1], images.shape[2]
    if images.is_floating_point() and images.dim() == 4 and images.shape[1] == 3:
        return images.shape[2], images.shape[3]
    raise ValueError(
        "images must be float (B, 3, height, width) in [-1, 1] or uint8 (B, height, width, 3), "
        f"got {images.dtype} of shape {tuple(images.shape)}"
    )


def split_patches(images: Tensor, patch_size: int) -> Tensor:
    """Float images (B, 3, height, width) as patches (B, L, 3, patch row, patch column), row-major."""
    batch, colours, height, width = images.shape
    grid = images.view(batch, colours, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls_token: Tensor,
    ids: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Project patches, add bias and position, prepend cls; only the patches `ids` when given.

    Args:
        images:    (B, 3, height, width) float in [-1, 1] or (B, height, width, 3) uint8.
        weight:    (D, 3, patch, patch) of the patch convolution.
        bias:      (D,).
        position:  (1, 1 + L, D), row 0 for cls.
        cls_token: (1, 1, D).
        ids:       (B, K) int64, patches to embed, or None for all. One outside [0, L) is an error on a CPU;
            the kernel, which cannot raise one, makes its token NaN.
        dtype:     of the result, the residual stream's; None for that of `position`.
    Returns:
        (B, 1 + K, D) in `dtype`.
    Raises:
        ValueError: an input of another shape, an image that does not have L patches, ids that are not (B, K)
            int64, a `dtype` that is not floating-point, or inputs on several devices.
    Source: ViT; embedding only the kept patches equals MAE's embed-then-drop.
    """
    rows = patch_embed_packed([(images, ids)], weight, bias, position, cls_token, dtype=dtype)
    tokens = position.shape[1] if ids is None else 1 + ids.shape[1]
    return rows.view(len(images), tokens, len(weight))


def patch_embed_packed(
    views: Sequence[View],
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls_token: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`patch_embed` of several views into the rows of one matrix, view after view.

    Args:
        views: images, and ids or None, of each view; the rest is as for `patch_embed`.
    Returns:
        (rows, D) in `dtype`; B * (1 + K) rows of each view, image after image.
    Raises:
        ValueError: there is no view, or as `patch_embed`.
    """
    if not views:
        raise ValueError("views must hold at least one, got none")
    dtype = dtype or position.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, got {dtype}")
    _check_parameters(weight, bias, position, cls_token)
    for images, ids in views:
        _check_view(images, ids, weight.shape[-1], position.shape[1] - 1)
        dispatch.same_device(
            images=images, weight=weight, bias=bias, position=position, cls_token=cls_token, ids=ids
        )
    parameters, compute = (weight, bias, position, cls_token), compute_dtype(weight)
    tensors = [*parameters, *(tensor for view in views for tensor in view)]
    if dispatch.takes("patch_embed", tensors, _refuses(views, position), dtype, compute):
        shown = [images for images, _ in views]
        given = [ids is not None for _, ids in views]
        numbers = [ids for _, ids in views if ids is not None]
        rows: Tensor = operators.patch_embed(shown, numbers, given, *parameters, dtype, compute)
        return rows
    parts = [_eager_view(*view, *parameters, dtype).flatten(0, 1) for view in views]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check_parameters(weight: Tensor, bias: Tensor, position: Tensor, cls_token: Tensor) -> None:
    if weight.dim() != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be (D, 3, patch, patch), got {tuple(weight.shape)}")
    width = len(weight)
    rows = position.shape[1] if position.dim() == 3 else 0
    for name, tensor, shape in (
        ("bias", bias, (width,)),
        ("position", position, (1, rows, width)),
        ("cls_token", cls_token, (1, 1, width)),
    ):
        if tensor.shape != shape:
            wanted = f"(1, 1 + L, {width})" if name == "position" else f"{shape}"
            raise ValueError(f"{name} must be {wanted}, got {tuple(tensor.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("position", position), ("cls", cls_token)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")


def _check_view(images: Tensor, ids: Tensor | None, patch: int, expected: int) -> None:
    height, width = image_size(images)
    patches = (height // patch) * (width // patch)
    if patches != expected:
        raise ValueError(f"image {tuple(images.shape)} gives {patches} patches, not {expected}")
    if height % patch or width % patch:
        raise ValueError(f"image {tuple(images.shape)} does not divide into patches of {patch} x {patch}")
    if ids is not None and (ids.dim() != 2 or len(ids) != len(images) or ids.dtype != torch.int64):
        raise ValueError(f"ids must be ({len(images)}, K) int64, got {tuple(ids.shape)} of {ids.dtype}")


def _refuses(views: Sequence[View], position: Tensor) -> str | None:
    wanted = position.requires_grad
    for images, ids in views:
        if (position.shape[1] - 1 if ids is None else ids.shape[1]) == 0:
            return "takes at least one patch of an image, got none"
        wanted = wanted or images.requires_grad
    if wanted and torch.is_grad_enabled():
        return "has no kernel for gradients of images or positions, and they require them"
    return None


def _eager_view(
    images: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls_token: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Sums are in the dtype of `position`."""
    patches = split_patches(normalise_images(images), weight.shape[-1]).flatten(2)
    place = position[:, 1:]
    if ids is not None:
        patches = gather_rows(patches, ids)
        place = gather_rows(place.expand(len(ids), -1, -1), ids)
    high = position.dtype
    tokens = linear(patches.to(compute_dtype(weight)), weight.flatten(1)).to(high) + (place + bias.to(high))
    cls = (cls_token.to(high) + position[:, :1]).expand(tokens.shape[0], -1, -1)
    return torch.cat([cls.to(dtype), tokens.to(dtype)], dim=1)
