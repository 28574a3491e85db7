"""Masked reconstruction losses: only the rows that are masked are read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops.masking import gather_rows
from lmim_fast.ops.patch_embed import normalise_images, split_patches


def masked_feature_target(features: Tensor, ids_masked: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Teacher features at the masked patches, each normalised over its features without affine.

    Args:
        features:   (B, 1 + L, D) teacher output, cls first.
        ids_masked: (B, M).
        eps:        added to the variance.
    Returns:
        (B, M, D) float32, without gradient.
    Source: LMIM's released target.
    """
    rows = gather_rows(features.detach(), ids_masked + 1)
    return F.layer_norm(rows.float(), rows.shape[-1:], eps=eps)


def masked_pixel_target(images: Tensor, ids_masked: Tensor, patch_size: int, *, normalise: bool) -> Tensor:
    """Pixels of the masked patches, ordered patch row, patch column, colour.

    Args:
        images:     as `normalise_images` takes them.
        ids_masked: (B, M).
        patch_size: side in pixels.
        normalise:  each patch to mean 0 and unbiased variance 1 (eps 1e-6).
    Returns:
        (B, M, 3 * patch_size^2) float32.
    Source: MAE's norm_pix_loss.
    """
    patches = split_patches(normalise_images(images).float(), patch_size)  # (B, L, 3, row, column)
    pixels = gather_rows(patches.permute(0, 1, 3, 4, 2).flatten(2), ids_masked)
    if not normalise:
        return pixels
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return (pixels - mean) * (variance + 1e-6).rsqrt()


def masked_mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all masked patches of the batch, in fp32.

    Args:
        pred:   (B, M, F) any float dtype.
        target: (B, M, F).
    Raises:
        ValueError: shapes differ (broadcasting would give a wrong loss).
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} must have one shape")
    return F.mse_loss(pred.float(), target.float())
