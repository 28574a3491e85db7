"""Which patches a sample keeps: one program is one warp and one sample, from noise or a seed to sorted ids.

The noise becomes integers that rank alike. The K-th smallest is found bit by bit, from the top, by counting
how many are smaller; ties at it are ranked by position. Then a running count gives each patch its place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.kernels.rows import padded_width

UNIFORM_BITS = tl.constexpr(24)  # of a number drawn in [0, 1)


@triton.jit
def _store_split(
    keys, visible_ptr, masked_ptr, sample, L: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the places of the K smallest of L uint32 keys below 2^BITS, and of the rest, both rising."""
    place = tl.arange(0, BLOCK)
    inside = place < L
    kth = tl.zeros((), tl.uint32)
    for step in range(BITS):
        higher = kth | (tl.full((), 1, tl.uint32) << (BITS - 1 - step))
        smaller = tl.sum(((keys < higher) & inside).to(tl.int32), 0)
        kth = tl.where(smaller < K, higher, kth)
    smaller = ((keys < kth) & inside).to(tl.int32)
    tied = ((keys == kth) & inside).to(tl.int32)
    first_tied = (tl.cumsum(tied, 0) <= K - tl.sum(smaller, 0)).to(tl.int32)
    kept = smaller | (tied & first_tied)
    before = tl.cumsum(kept, 0) - kept
    value = place.to(tl.int64)
    tl.store(visible_ptr + sample * K + before, value, mask=inside & (kept > 0))
    tl.store(masked_ptr + sample * (L - K) + place - before, value, mask=inside & (kept == 0))


@triton.jit
def select_patches_kernel(
    noise_ptr, visible_ptr, masked_ptr, stride_b, stride_l, L: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Places of the K smallest of each sample's L values, and of the rest."""
    sample = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    noise = tl.load(noise_ptr + sample * stride_b + place * stride_l, mask=place < L, other=0.0)
    bits = noise.to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    bits = tl.where(size == 0, 0, bits)  # -0 equals 0
    keys = bits.to(tl.uint32, bitcast=True) ^ ((bits >> 31).to(tl.uint32, bitcast=True) | 0x80000000)
    keys = tl.where(size > 0x7F800000, 0xFFFFFFFF, keys)  # NaN comes last
    _store_split(keys, visible_ptr, masked_ptr, sample, L, K, 32, BLOCK)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "epoch"])
def draw_patches_kernel(
    indices_ptr, epochs_ptr, visible_ptr, masked_ptr, seed_low, seed_high, epoch, stride_i, stride_e,
    STREAM: tl.constexpr, L: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for values drawn by Philox: counter (block, index, epoch, STREAM), four values a block."""
    sample = tl.program_id(0).to(tl.int64)
    index = tl.load(indices_ptr + sample * stride_i).to(tl.uint32)
    if epochs_ptr is not None:
        epoch = tl.load(epochs_ptr + sample * stride_e)
    block = tl.arange(0, BLOCK // 4).to(tl.uint32)
    zero = block * 0
    seed = (seed_high.to(tl.uint32).to(tl.uint64) << 32) | seed_low.to(tl.uint32).to(tl.uint64)
    first, second, third, fourth = tl.philox(
        seed, block, zero + index, zero + epoch.to(tl.uint32), zero + STREAM
    )
    words = tl.join(tl.join(first, third), tl.join(second, fourth))
    keys = tl.reshape(words, (BLOCK,)) >> (32 - UNIFORM_BITS)
    _store_split(keys, visible_ptr, masked_ptr, sample, L, K, UNIFORM_BITS, BLOCK)


def _outputs(like: Tensor, samples: int, patches: int, num_visible: int) -> tuple[Tensor, Tensor]:
    visible = like.new_empty((samples, num_visible), dtype=torch.int64)
    return visible, like.new_empty((samples, patches - num_visible), dtype=torch.int64)


def select(noise: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Split patches by rank.

    Args:
        noise:       (B, L) float.
        num_visible: K, with 0 < K < L.
    Returns:
        the places of the K smallest values (B, K) and of the others (B, L - K), int64, rising.
    """
    samples, patches = noise.shape
    visible, masked = _outputs(noise, samples, patches, num_visible)
    runtime.launch(
        select_patches_kernel, (samples,), noise, visible, masked, noise.stride(0), noise.stride(1),
        L=patches, K=num_visible, BLOCK=padded_width(patches), num_warps=1,
    )  # fmt: skip
    return visible, masked


def draw(
    seed: int, epochs: Tensor | None, epoch: int, indices: Tensor, patches: int, num_visible: int, stream: int
) -> tuple[Tensor, Tensor]:
    """As `select`, of noise that is drawn here.

    Args:
        seed:        key, its lowest 64 bits.
        epochs:      (B,) int64, or None for `epoch`.
        epoch:       of all samples, in [0, 2^32).
        indices:     (B,) int64, in [0, 2^32).
        patches:     L.
        num_visible: K, with 0 < K < L.
        stream:      last word of the counter.
    """
    samples = len(indices)
    visible, masked = _outputs(indices, samples, patches, num_visible)
    runtime.launch(
        draw_patches_kernel, (samples,), indices, epochs, visible, masked, _signed(seed), _signed(seed >> 32),
        _signed(epoch), indices.stride(0), 0 if epochs is None else epochs.stride(0), STREAM=stream,
        L=patches, K=num_visible, BLOCK=padded_width(patches), num_warps=1,
    )  # fmt: skip
    return visible, masked


def _signed(number: int) -> int:
    """The int32 with the lowest 32 bits of a number: one compiled kernel then serves them all."""
    return (number + 2**31) % 2**32 - 2**31
