"""What masked patches are reconstructed from the decoder's prediction: a teacher's features, or pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lmim_fast.ops.feature_loss import (
    masked_feature_loss,
    masked_feature_target,
    masked_pixel_loss,
    masked_pixel_target,
)


@dataclass
class Target:
    """Source of the target: the teacher's features where they are given, else the pixels."""

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
        """The target of patches (B, M), written out: (B, M, D or P) fp32."""
        if self.features is not None:
            return masked_feature_target(self.features, ids_masked)
        return masked_pixel_target(self.images, ids_masked, self.patch_size, normalise=self.normalise)
