"""Small kernels with known faults, as cases for `python -m benchmarks.static --cases`."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from benchmarks.static_build import Case
from lmim_fast.kernels import runtime


@triton.jit
def add_one(x_ptr, out_ptr, scale, count, offset, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at + offset, mask=at < count)
    tl.store(out_ptr + at, x * scale + 1, mask=at < count)


@triton.jit
def keep_too_much(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x * tl.sum(x))


@triton.jit
def multiply(x_ptr, y_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :])
    y = tl.load(y_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(x, y))


def pointwise() -> None:
    x = torch.empty(1000, dtype=torch.bfloat16, device="meta")
    runtime.launch(add_one, (8,), x, torch.empty_like(x), 2.0, 1000, 1, num_warps=4, BLOCK=128)
    runtime.launch(add_one, (8,), x, torch.empty_like(x), 2.0, 1008, 1, num_warps=4, BLOCK=128)
    runtime.launch(add_one, (8,), x, torch.empty_like(x), 3.0, 1008, 1, num_warps=4, BLOCK=128)


def spilling() -> None:
    x = torch.empty(16384, device="meta")
    runtime.launch(keep_too_much, (1,), x, torch.empty_like(x), num_warps=1, BLOCK=16384)


def product(dtype: torch.dtype = torch.float16, rows: int = 64) -> None:
    x = torch.empty(rows, 64, dtype=dtype, device="meta")
    y = torch.empty(64, 64, dtype=dtype, device="meta")
    out = torch.empty(rows, 64, device="meta")
    runtime.launch(multiply, (1,), x, y, out, num_warps=4, M=rows, N=64, K=64)


def cases() -> Iterator[Case]:
    yield "pointwise", pointwise
    yield "16-bit product", product
    yield "spilling", spilling
