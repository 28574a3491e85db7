"""Where kernels run and how they are launched: on a CUDA device, in Triton's interpreter, or recorded."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED_MULTIPROCESSORS = 2  # few, so that the loops over rows are run in the interpreter too


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as it would be compiled; `options` are the compiler's."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass
class Recording:
    """Launches that were asked for while it was open, for a device of this compute capability."""

    capability: tuple[int, int]
    multiprocessors: int
    launches: list[Launch]


_recording: Recording | None = None


@contextlib.contextmanager
def recording(capability: tuple[int, int], multiprocessors: int = 132) -> Iterator[Recording]:
    """Inside the block kernels are not run: their launches, on tensors of any device, are collected."""
    global _recording
    previous, _recording = _recording, Recording(capability, multiprocessors, [])
    try:
        yield _recording
    finally:
        _recording = previous


def can_run(device: torch.device) -> bool:
    """True on a CUDA device with Triton installed, and on a CPU under Triton's interpreter."""
    if not TRITON_INSTALLED:
        return False
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int,
    num_stages: int = 1,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Run `kernel` on the device of its first tensor argument.

    Args:
        kernel:     a function under `triton.jit`.
        grid:       programs along each axis; nothing is launched where one is 0.
        arguments:  tensors and numbers, in the kernel's order.
        num_warps:  warps of a program.
        num_stages: depth of software pipelines.
        maxnreg:    registers that a thread may have (`registers`); None: the compiler's choice.
        constants:  the kernel's constexpr arguments.
    """
    options = dict(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)
    options["enable_fp_fusion"] = True  # Triton 3.10 will fuse products and sums only if asked to
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, arguments, constants, options))
        return
    if 0 in grid:
        return
    settle_key(kernel)
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*arguments, **options, **constants)


_settled: set[int] = set()  # ids of functions, which live as long as the process


def settle_key(kernel: Any) -> None:
    """Have the functions that `kernel` calls get their keys in Triton's cache before its own; once each.

    Triton 3.6 makes a key of those global constants that the called functions have told of by then. So it
    would depend on what ran before, and a process would compile what another one has compiled already.
    """
    if id(kernel) in _settled or not hasattr(type(kernel), "cache_key"):  # the interpreter has none
        return
    _settled.add(id(kernel))
    for name in kernel.fn.__code__.co_names:
        called = kernel.fn.__globals__.get(name)
        if type(called) is type(kernel):
            settle_key(called)
    kernel.cache_key  # noqa: B018 - computed at the first access


def registers(programs: int, num_warps: int) -> int:
    """Registers of a thread if so many programs of so many warps share a multiprocessor.

    As `maxnreg` it also keeps ptxas from spilling a few bytes to fit one more program than the grid has.
    """
    return min(255, 65536 // (programs * num_warps * 32) // 8 * 8)  # they are given out in eights


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability that launch configurations are chosen for; the interpreter counts as (9, 0)."""
    if _recording is not None:
        return _recording.capability
    if device.type != "cuda":
        return (9, 0)
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    if _recording is not None:
        return _recording.multiprocessors
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
