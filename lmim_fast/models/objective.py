"""Pre-training: which patches stay visible, what the others are reconstructed to, and the losses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lmim_fast.ops.feature_loss import (
    masked_feature_loss,
    masked_feature_target,
    masked_pixel_loss,
    masked_pixel_target,
)
from lmim_fast.ops.masking import select_patches


def choose_patches(
    images: Tensor,
    noise: Tensor | None,
    patches: tuple[Tensor, Tensor] | None,
    num_patches: int,
    num_visible: int,
) -> tuple[Tensor, Tensor]:
    """ids_visible (B, K), ids_masked (B, L - K): `patches` if passed, else by `noise` (None draws it).

    Raises:
        ValueError: the ids in `patches` have another shape.
    """
    if patches is None:
        if noise is None:
            noise = torch.rand(len(images), num_patches, device=images.device)
        return select_patches(noise, num_visible)
    for name, ids, count in zip(
        ("visible", "masked"), patches, (num_visible, num_patches - num_visible), strict=True
    ):
        if ids.shape != (len(images), count):
            raise ValueError(
                f"ids of {name} patches must be ({len(images)}, {count}), got {tuple(ids.shape)}"
            )
    return patches


@dataclass
class Target:
    """What masked patches are reconstructed to: the teacher's features, or pixels if there are none."""

    images: Tensor
    """As `patch_embed` takes them."""
    features: Tensor | None
    """(B, 1 + L, D) of the teacher, or None."""
    patch_size: int
    normalise: bool
    """Normalise the pixels of each patch."""

    def loss(self, product: Tensor, bias: Tensor, ids_masked: Tensor) -> Tensor:
        """Mean squared error of `product + bias` (B, M, D or P), the prediction of patches (B, M)."""
        if self.features is not None:
            return masked_feature_loss(product, bias, self.features, ids_masked)
        return masked_pixel_loss(
            product, bias, self.images, ids_masked, self.patch_size, normalise=self.normalise
        )

    def rows(self, ids_masked: Tensor) -> Tensor:
        """The target of patches (B, M) as a tensor (B, M, D or P), fp32; the loss never writes it."""
        if self.features is not None:
            return masked_feature_target(self.features, ids_masked)
        return masked_pixel_target(self.images, ids_masked, self.patch_size, normalise=self.normalise)


@dataclass
class PretrainOutput:
    """Losses for the training step; prediction, target and mask for reports and tests, computed on access."""

    loss: Tensor  # ()
    loss_recon: Tensor  # ()
    loss_align: Tensor  # ()
    latent: Tensor  # (B, 1 + K, D)
    memory: Tensor | None  # (B, 1 + L, D), None without guidance
    ids_visible: Tensor  # (B, K) rising
    ids_masked: Tensor  # (B, M) rising
    product: Tensor  # (B, M, D or P) prediction of the masked patches without its bias
    bias: Tensor  # (D or P,)
    target_source: Target

    @property
    def pred(self) -> Tensor:
        """(B, M, D or P) prediction of the masked patches, in the order of ids_masked."""
        return self.product + self.bias.to(self.product.dtype)

    @cached_property
    def target(self) -> Tensor:
        """(B, M, D or P) fp32 target of the masked patches, in the order of ids_masked."""
        return self.target_source.rows(self.ids_masked)

    @cached_property
    def mask(self) -> Tensor:
        """(B, L), 1 is masked."""
        zeros = self.loss.new_zeros(
            len(self.ids_masked), self.ids_visible.shape[1] + self.ids_masked.shape[1]
        )
        return zeros.scatter(1, self.ids_masked, 1.0)
