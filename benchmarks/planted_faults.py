"""Kernels with a fault, which a checker that works has to find."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmim_fast.kernels import runtime

_THREADS = 128


@triton.jit
def planted_write(out_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes one value behind the `COUNT` that there are."""
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, at.to(tl.float32), mask=at <= COUNT)


@triton.jit
def planted_race(out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """All threads write one word of shared memory and read it, with no barrier: Triton sets none here."""
    at = tl.arange(0, BLOCK)
    seen = tl.inline_asm_elementwise(
        """{
        .shared .align 4 .b32 word;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        st.volatile.shared.u32 [word], thread;
        ld.volatile.shared.u32 $0, [word];
        }""",
        "=r,r",
        [at],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(out_ptr + at, seen)


FAULTS = {"memcheck": planted_write, "racecheck": planted_race}  # by the tool that has to find them


def launch_faulty(tool: str, device: torch.device) -> None:
    """Launch the fault that `tool` has to find."""
    kernel = FAULTS[tool]
    if kernel is planted_write:
        out, constants = torch.empty(_THREADS // 2, device=device), dict(COUNT=_THREADS // 2)
    else:
        out, constants = torch.empty(_THREADS, dtype=torch.int32, device=device), {}
    runtime.launch(kernel, (1,), out, num_warps=_THREADS // 32, BLOCK=_THREADS, **constants)
