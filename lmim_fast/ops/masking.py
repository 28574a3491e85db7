"""Random masking: which patches a sample keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from lmim_fast.ops import dispatch, philox
from lmim_fast.ops.operators import masking as operators
from lmim_fast.ops.philox import Stream

_MAX_PATCHES = 1024  # more do not fit the registers of a warp


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
        noise:       (B, L) float; equal values are ranked by position, NaN above all others.
        num_visible: K patches to keep.
    Returns:
        ids_visible (B, K) and ids_masked (B, L - K), int64, rising.
    Raises:
        ValueError: noise is not 2-d or not floating-point, or K is not in [1, L - 1].
    Source: MAE's random masking (the kept set is the same; its order is not read by any loss).
    """
    if noise.dim() != 2:
        raise ValueError(f"noise must be (B, L), got shape {tuple(noise.shape)}")
    if not noise.is_floating_point():
        raise ValueError(f"noise must be floating-point, got {noise.dtype}")
    _check_visible(num_visible, noise.shape[1])
    if not dispatch.takes("select_patches", (noise,), _refuses(noise.shape[1])):
        return _select_eager(noise, num_visible)
    visible, masked = operators.select_patches(noise.detach(), num_visible)
    return visible, masked


def draw_patches(
    seed: int,
    epochs: int | Tensor,
    indices: Tensor,
    num_patches: int,
    num_visible: int,
    stream: Stream = Stream.MASK,
) -> tuple[Tensor, Tensor]:
    """`select_patches` of `mask_noise`; a kernel does it in one launch and never writes the noise.

    Args:
        seed:        of the run; its lowest 64 bits count.
        epochs:      epoch of each sample, (B,) int64, or one for all; in [0, 2^32).
        indices:     (B,) int64 sample indices, in [0, 2^32).
        num_patches: L.
        num_visible: K patches to keep.
        stream:      MASK for LMIM, MAE_MASK for the MAE stage.
    Returns:
        ids_visible (B, K) and ids_masked (B, L - K), int64, rising, on the device of `indices`.
    Raises:
        ValueError: K is not in [1, L - 1], indices or epochs is not (B,) int64, they are on several devices,
            or one epoch for all is out of range.
    Source: MAE's random masking; Philox of Salmon et al. 2011.
    """
    _check_visible(num_visible, num_patches)
    for name, tensor in (("indices", indices), ("epochs", epochs)):
        if isinstance(tensor, Tensor) and (tensor.dtype != torch.int64 or tensor.shape != indices.shape[:1]):
            wanted = "(B,)" if name == "indices" else f"({len(indices)},)"
            raise ValueError(f"{name} must be {wanted} int64, got {tuple(tensor.shape)} of {tensor.dtype}")
    if isinstance(epochs, Tensor):
        dispatch.same_device(epochs=epochs, indices=indices)
    elif not 0 <= epochs < 2**32:
        raise ValueError(f"epochs must be in [0, 2^32), got {epochs}")
    if not dispatch.takes("draw_patches", (indices,), _refuses(num_patches)):
        return _select_eager(mask_noise(seed, epochs, indices, num_patches, stream), num_visible)
    each, every = (epochs, 0) if isinstance(epochs, Tensor) else (None, epochs)
    signed = (seed + 2**63) % 2**64 - 2**63  # what an operator's integer can hold
    visible, masked = operators.draw_patches(
        signed, each, every, indices, num_patches, num_visible, int(stream)
    )
    return visible, masked


def gather_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (B, K) of x (B, N, D), as (B, K, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))


def _check_visible(num_visible: int, patches: int) -> None:
    if not 1 <= num_visible < patches:
        raise ValueError(f"num_visible must be in [1, {patches - 1}], got {num_visible}")


def _select_eager(noise: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    order = noise.argsort(dim=1, stable=True)
    return order[:, :num_visible].sort(dim=1).values, order[:, num_visible:].sort(dim=1).values


def _refuses(patches: int) -> str | None:
    return None if patches <= _MAX_PATCHES else f"takes at most {_MAX_PATCHES} patches, got {patches}"
