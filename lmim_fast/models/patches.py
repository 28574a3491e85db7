"""Which patches a batch keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from lmim_fast.ops.masking import select_patches


def choose_patches(
    images: Tensor,
    noise: Tensor | None,
    patches: tuple[Tensor, Tensor] | None,
    num_patches: int,
    num_visible: int,
) -> tuple[Tensor, Tensor]:
    """ids_visible (B, K) and ids_masked (B, L - K): those given, else by the noise, else by new noise.

    Raises:
        ValueError: the ids that are given have another shape.
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
