"""A kernel that computes exponentials and nothing else: the rate of the special function units."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lmim_fast.kernels import runtime

_BLOCK = 1024  # 8 independent chains a thread hide the latency


@triton.jit
def exponentials_kernel(x_ptr, REPEATS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    for _ in range(REPEATS):
        x = tl.exp2(-x)  # values in [0, 1] stay there
    tl.store(x_ptr + at, x)


def exponentials(x: Tensor, repeats: int) -> None:
    """x <- 2^-x, `repeats` times, in place, for fp32 x in [0, 1] of a multiple of 1024 elements."""
    if x.numel() % _BLOCK:
        raise ValueError(f"the number of elements must be a multiple of {_BLOCK}, got {x.numel()}")
    runtime.launch(exponentials_kernel, (x.numel() // _BLOCK,), x, num_warps=4, REPEATS=repeats, BLOCK=_BLOCK)
