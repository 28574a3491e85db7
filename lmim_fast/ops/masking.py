"""Random masking: which patches a sample keeps."""

from __future__ import annotations

from torch import Tensor

from lmim_fast.ops import philox
from lmim_fast.ops.dispatch import run
from lmim_fast.ops.philox import Stream


def mask_noise(
    seed: int, epochs: int | Tensor, indices: Tensor, num_patches: int, stream: Stream = Stream.MASK
) -> Tensor:
    """Noise that ranks the patches of each sample: a function of (seed, epoch, sample index) alone.

    Args:
        seed:        of the run.
        epochs:      epoch of each sample, (B,) int64, or one for all.
        indices:     (B,) int64 sample indices.
        num_patches: L.
        stream:      MASK for LMIM, MAE_MASK for the MAE stage.
    Returns:
        (B, L) float32 in [0, 1), on the device of `indices`.
    """
    return philox.uniform(seed, epochs, indices, num_patches, stream)


def select_patches(noise: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Split the patches into those with the smallest noise and the rest, each in reading order.

    Args:
        noise:       (B, L) float; equal values are ranked by position.
        num_visible: K patches to keep.
    Returns:
        ids_visible (B, K) and ids_masked (B, L - K), int64, rising.
    Raises:
        ValueError: noise is not 2-d, or K is not in [1, L - 1].
    Source: MAE's random masking (the kept set is the same; its order is not read by any loss).
    """
    if noise.dim() != 2:
        raise ValueError(f"noise must be (B, L), got shape {tuple(noise.shape)}")
    if not 1 <= num_visible < noise.shape[1]:
        raise ValueError(f"num_visible must be in [1, {noise.shape[1] - 1}], got {num_visible}")
    return run("select_patches", _eager, noise, num_visible)


def _eager(noise: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    order = noise.argsort(dim=1, stable=True)
    return order[:, :num_visible].sort(dim=1).values, order[:, num_visible:].sort(dim=1).values


def gather_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (B, K) of x (B, N, D), as (B, K, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))
