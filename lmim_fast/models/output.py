"""What a forward pass of LMIM or MAE gives back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lmim_fast.models.target import Target


@dataclass
class PretrainOutput:
    """The losses a training step reads, and what pictures and tests look at: made when it is asked for."""

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
