"""The inputs that the attention kernels are made for."""

from __future__ import annotations

import torch

from lmim_fast.kernels import runtime

ALL_ON_CHIP = 64  # keys up to which the backward pass needs nothing of the forward pass
# Keys that a program holds on chip without spilling registers (`python -m benchmarks.static`).
LARGEST, WIDE_WITH_DROPOUT = 257, 129
FEW_QUERIES, WHOLE_TILES = 32, 256  # one block of queries, no missing key: then LARGEST fits with dropout too
WIDTHS = (32, 64)  # of a head
MOST_QUERIES = 2**16  # their places in memory are 32-bit numbers


def reach(capability: tuple[int, int], dim: int, p: float, queries: int, keys: int) -> int:
    """Keys up to which the kernels go at this head width and dropout probability, for a call of this size."""
    if capability[0] not in (9, 10):
        return ALL_ON_CHIP
    fits_with_dropout = dim < 64 or (queries <= FEW_QUERIES and keys >= WHOLE_TILES)
    return LARGEST if p == 0 or fits_with_dropout else WIDE_WITH_DROPOUT


def _refuses(
    device: torch.device, dtype: torch.dtype, queries: int, keys: int, dim: int, p: float
) -> str | None:
    """Why the kernel is not for such heads, or None."""
    if dim not in WIDTHS:
        return f"needs heads of width {' or '.join(map(str, WIDTHS))}, got {dim}"
    if device.type == "cuda" and dtype == torch.float32:
        return "has no fast product for torch.float32"
    capability = runtime.capability(device)
    if capability[0] < 8:
        return f"needs compute capability 8.0 or higher, got {capability[0]}.{capability[1]}"
    largest = reach(capability, dim, p, queries, keys)
    if keys > largest:
        return (
            f"takes up to {largest} keys for heads of width {dim} at p = {p} on compute capability "
            f"{capability[0]}.{capability[1]}, got {keys}"
        )
    return None


def _refuses_mask(name: str, keys: int) -> str | None:
    return f"takes up to {ALL_ON_CHIP} keys with {name}, got {keys}" if keys > ALL_ON_CHIP else None


def refuses_self(qkv, qkv_bias, heads, segments, p, seed, causal=False, added=False):  # type: ignore[no-untyped-def]
    """Why the kernel is not for these arguments of `ops.attention.self_attention`, or None."""
    dim = qkv.shape[1] // 3 // heads
    for _, tokens in segments:
        if reason := _refuses(qkv.device, qkv.dtype, tokens, tokens, dim, p):
            return reason
    return _refuses_mask("a causal mask", max(tokens for _, tokens in segments)) if causal else None


def refuses_cross(  # type: ignore[no-untyped-def]
    q, q_bias, kv, kv_bias, heads, p, seed, key_lengths=None, added=False
):
    """Why the kernel is not for these arguments of `ops.attention.cross_attention`, or None."""
    queries, keys = q.shape[1], kv.shape[1]
    if queries > MOST_QUERIES:
        return f"takes up to {MOST_QUERIES} queries, got {queries}"
    reason = _refuses(q.device, q.dtype, queries, keys, q.shape[2] // heads, p)
    return _refuses_mask("key_lengths", keys) if reason is None and key_lengths is not None else reason
