"""Where kernels run and how they are launched: on a CUDA device, in Triton's interpreter, or recorded."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
LAUNCHES = ("triton", "direct")  # through Triton's JIT, or without it where that was there before: direct.py
INTERPRETED_MULTIPROCESSORS = 2  # few, so that the loops over rows are run in the interpreter too


class Launch(NamedTuple):
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
    """True on a CUDA device with Triton installed, on a CPU under Triton's interpreter, while recording."""
    if not TRITON_INSTALLED:
        return False
    if _recording is not None:
        return True
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def interpreted(device: torch.device) -> bool:
    """Kernels on the device run in Triton's interpreter, whose products of bf16 are wrong."""
    return device.type == "cpu" and _recording is None


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
    options = _options(num_warps, num_stages, maxnreg)
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, arguments, constants, options))
        return
    if 0 in grid:
        return
    if id(kernel) not in _settled:
        settle_key(kernel)
    start = _start or _chosen()
    elsewhere = _elsewhere(arguments)
    if elsewhere is None:
        start(kernel, grid, arguments, options, constants)
    else:
        with torch.cuda.device(elsewhere):
            start(kernel, grid, arguments, options, constants)


Start = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any], dict[str, Any]], None]
_start: Start | None = None  # of the innermost `launching` block


@contextlib.contextmanager
def launching(name: str) -> Iterator[None]:
    """Inside the block kernels are launched as `LMIM_FAST_LAUNCH=name` would have it."""
    global _start
    previous, _start = _start, _named(name)
    try:
        yield
    finally:
        _start = previous


@functools.cache
def _chosen() -> Start:
    """What `LMIM_FAST_LAUNCH` says, once: launches are too many to read it at each."""
    return _named(os.environ.get("LMIM_FAST_LAUNCH", "triton"))


def _named(name: str) -> Start:
    if name not in LAUNCHES:
        raise ValueError(f"unknown LMIM_FAST_LAUNCH {name!r}; choose from {', '.join(LAUNCHES)}")
    if name == "direct":
        from lmim_fast.kernels import direct  # it imports Triton

        reason = direct.unfit()
        if reason is None:
            return direct.launch
        warnings.warn(f"{reason}: kernels are launched through Triton's JIT", stacklevel=2)
    return _through_triton


def _through_triton(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    constants: dict[str, Any],
) -> None:
    kernel[grid](*arguments, **options, **constants)


@functools.cache
def _options(num_warps: int, num_stages: int, maxnreg: int | None) -> dict[str, Any]:
    """The compiler's options; they are shared, and so not to be changed."""
    # Triton 3.10 will fuse products and sums only if asked to.
    return dict(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg, enable_fp_fusion=True)


def _elsewhere(arguments: tuple[Any, ...]) -> int | None:
    """The CUDA device of the first tensor where it is not the current one."""
    for value in arguments:
        if isinstance(value, Tensor):
            index = value.get_device()
            return index if value.is_cuda and index != torch.cuda.current_device() else None
    return None


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


@functools.cache
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
    return _properties(device.index)[0]


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    if _recording is not None:
        return _recording.multiprocessors
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return _properties(device.index)[1]


def _properties(index: int | None) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors of a CUDA device; None: of the current one."""
    return _properties_of(torch.cuda.current_device() if index is None else index)


@functools.cache
def _properties_of(index: int) -> tuple[tuple[int, int], int]:
    found = torch.cuda.get_device_properties(index)
    return (found.major, found.minor), found.multi_processor_count
