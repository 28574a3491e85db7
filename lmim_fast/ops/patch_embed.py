"""Patch embedding of all patches or of the kept ones only."""

from __future__ import annotations

import torch
from torch import Tensor

from lmim_fast.ops.dispatch import run
from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.masking import gather_rows


def normalise_images(images: Tensor) -> Tensor:
    """uint8 (B, height, width, 3) to fp32 (B, 3, height, width) in [-1, 1]; float images pass.

    Raises:
        ValueError: neither of the two layouts.
    """
    if images.dtype == torch.uint8 and images.dim() == 4 and images.shape[3] == 3:
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    if images.is_floating_point() and images.dim() == 4 and images.shape[1] == 3:
        return images
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
) -> Tensor:
    """Project patches, add bias and position, prepend cls; only the patches `ids` when given.

    Args:
        images:    (B, 3, height, width) float in [-1, 1] or (B, height, width, 3) uint8.
        weight:    (D, 3, patch, patch) of the patch convolution.
        bias:      (D,).
        position:  (1, 1 + L, D), row 0 for cls.
        cls_token: (1, 1, D).
        ids:       (B, K) patches to embed, or None for all.
    Returns:
        (B, 1 + K, D) in the dtype of `position` (the residual stream's).
    Raises:
        ValueError: the image does not have L patches, or ids is not (B, K).
    Source: ViT; embedding only the kept patches equals MAE's embed-then-drop.
    """
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[-2:]
    patch = weight.shape[-1]
    patches = (height // patch) * (width // patch)
    if patches != position.shape[1] - 1:
        raise ValueError(f"image {tuple(images.shape)} gives {patches} patches, not {position.shape[1] - 1}")
    if ids is not None and (ids.dim() != 2 or ids.shape[0] != images.shape[0]):
        raise ValueError(f"ids must be ({images.shape[0]}, K), got {tuple(ids.shape)}")
    return run("patch_embed", _eager, images, weight, bias, position, cls_token, ids)


def _eager(
    images: Tensor, weight: Tensor, bias: Tensor, position: Tensor, cls_token: Tensor, ids: Tensor | None
) -> Tensor:
    patches = split_patches(normalise_images(images), weight.shape[-1]).flatten(2)
    place = position[:, 1:]
    if ids is not None:
        patches = gather_rows(patches, ids)
        place = gather_rows(place.expand(len(ids), -1, -1), ids)
    dtype = position.dtype
    tokens = linear(patches.to(compute_dtype(weight)), weight.flatten(1)).to(dtype) + (place + bias.to(dtype))
    cls = (cls_token.to(dtype) + position[:, :1]).expand(tokens.shape[0], -1, -1)
    return torch.cat([cls, tokens], dim=1)
