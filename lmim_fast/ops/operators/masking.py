"""Which patches a sample keeps, by its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lmim_fast import kernels
from lmim_fast.ops.operators.operator import operator


def _select_fake(noise, num_visible):  # type: ignore[no-untyped-def]
    samples, patches = noise.shape
    visible = noise.new_empty((samples, num_visible), dtype=torch.int64)
    return visible, noise.new_empty((samples, patches - num_visible), dtype=torch.int64)


@operator(_select_fake)
def select_patches(noise: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Places of the K smallest values of each row, and of the others."""
    return kernels.masking.select(noise, num_visible)


def _draw_fake(  # type: ignore[no-untyped-def]
    seed, epochs, epoch, indices, patches, num_visible, stream
):
    samples = len(indices)
    return indices.new_empty((samples, num_visible)), indices.new_empty((samples, patches - num_visible))


@operator(_draw_fake)
def draw_patches(
    seed: int, epochs: Tensor | None, epoch: int, indices: Tensor, patches: int, num_visible: int, stream: int
) -> tuple[Tensor, Tensor]:
    """The same of noise that is drawn; `epoch` is that of all samples where `epochs` is None."""
    return kernels.masking.draw(seed, epochs, epoch, indices, patches, num_visible, stream)
