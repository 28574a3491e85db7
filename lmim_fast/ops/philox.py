"""Counter-based uniform numbers: every draw is a function of (seed, epoch, sample index), nothing else.

Philox4x32-10 of Salmon et al. 2011, the generator of CUDA torch and of `tl.rand`: kernels agree with it.
The counter is (block, sample index, epoch, stream), the key is the seed; block j yields values 4j .. 4j + 3.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from lmim_fast.native import native
from lmim_fast.ops.transforms import transformed

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


class Stream(enum.IntEnum):
    """What a draw is for; two streams never share a number."""

    MASK = 0
    GUIDANCE = 1
    ORDER = 2
    MAE_MASK = 3
    DROPOUT = 4
    AUGMENT = 5
    NOISE = 6


def _multiply(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant x value (both below 2^32), without leaving int64."""
    low = constant * (value & 0xFFFF)  # below 2^48
    high = constant * (value >> 16) + (low >> 16)  # below 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def uint32(seed: int | Tensor, epoch: int | Tensor, index: Tensor, count: int, stream: int) -> Tensor:
    """Random 32-bit integers for each sample.

    Args:
        seed:   key, 64 bits are used; a number, or (1,) int64.
        epoch:  below 2^32; one number, or (B,) int64, one for each sample.
        index:  (B,) int64 sample indices, 0 <= index < 2^32.
        count:  numbers per sample.
        stream: a `Stream`.
    Returns:
        (B, count) int64 in [0, 2^32), on the device of `index`.
    Raises:
        ValueError: `index` is not a 1-d int64 tensor, or epoch is out of range.
    """
    _check(epoch, index)
    if _runs_native(seed, epoch, index):
        return _native(seed, epoch, index, count, stream, torch.int64)
    return _eager(seed, epoch, index, count, stream)


def _eager(seed: int | Tensor, epoch: int | Tensor, index: Tensor, count: int, stream: int) -> Tensor:
    """In PyTorch: on any device, inside a graph."""
    blocks = -(-count // 4)
    shape = (index.shape[0], blocks)
    c0 = torch.arange(blocks, device=index.device).expand(shape)
    c1 = (index & _LOW)[:, None].expand(shape)
    c2 = torch.as_tensor(epoch, device=index.device).reshape(-1, 1).expand(shape)
    c3 = torch.full(shape, int(stream), device=index.device)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(_ROUND_A, c0)
        high1, low1 = _multiply(_ROUND_B, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)[:, :count]


def uniform(seed: int | Tensor, epoch: int | Tensor, index: Tensor, count: int, stream: int) -> Tensor:
    """Uniform fp32 numbers in [0, 1) with 24 random bits; arguments and errors as `uint32`.

    Returns:
        (B, count) float32, on the device of `index`.
    """
    _check(epoch, index)
    if _runs_native(seed, epoch, index):
        return _native(seed, epoch, index, count, stream, torch.float32)
    return (_eager(seed, epoch, index, count, stream) >> 8).float() * 2.0**-24


def _check(epoch: int | Tensor, index: Tensor) -> None:
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(f"index must be a 1-d int64 tensor, got {index.dtype} of shape {tuple(index.shape)}")
    if isinstance(epoch, int) and not 0 <= epoch <= _LOW:
        raise ValueError(f"epoch must be in [0, 2^32), got {epoch}")


def _runs_native(seed: int | Tensor, epoch: int | Tensor, index: Tensor) -> bool:
    """True if the C++ form is built and nothing has to see the operations of the eager one."""
    if type(index) is not Tensor or not index.is_cpu or not isinstance(seed, int):
        return False
    if not isinstance(epoch, int) and type(epoch) is not Tensor:
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or transformed():
        return False
    return not torch._C._get_tracing_state() and native() is not None


def _native(
    seed: int | Tensor, epoch: int | Tensor, index: Tensor, count: int, stream: int, dtype: torch.dtype
) -> Tensor:
    values = torch.empty((len(index), count), dtype=dtype, device="cpu")
    epochs = torch.as_tensor(epoch, dtype=torch.int64, device="cpu").reshape(-1).contiguous()
    native().philox(
        int(seed) % 2**64, epochs.numpy(), index.contiguous().numpy(), int(stream), values.numpy()
    )
    return values
