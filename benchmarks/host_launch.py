"""Launches of compiled kernels on a driver that does nothing: what Triton's Python costs the host.

Kernels are compiled for sm_90, and Triton's JIT and its compiled kernels are the real ones. What is put in
their place is the driver: no binary is loaded, and nothing takes the arguments to a GPU. That last part, a C
function and CUDA's own launch, comes on top of both times alike.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.operation import kernel_name
from benchmarks.turns import cpu_microseconds, in_turn
from lmim_fast.kernels import attention, direct, linear_gelu, norm, runtime

_WARMUP = 2
_CALLS = 1000
Launched = tuple[tuple[int, ...], int, tuple[Any, ...]]  # grid, stream, arguments


class Driver:
    """Stands in for Triton's CUDA driver on a machine without one."""

    def __init__(self, launched: Callable[[Launched], object]) -> None:
        from triton.backends.compiler import GPUTarget

        self.device, self.stream = 0, 0
        self._target, self._launched = GPUTarget("cuda", 90, 32), launched
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (1, 1, 0, 0, 1024),  # up to threads of a block
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What a compiled kernel calls with all that a launch needs; as Triton's, it calls the hooks."""

        def run(
            x: int, y: int, z: int, stream: int, function: Any, packed: Any, told: Any, enter: Any,
            leave: Any, *arguments: Any,
        ) -> None:  # fmt: skip
            if enter is not None:
                enter(told)
            self._launched(((x, y, z), stream, arguments))
            if leave is not None:
                leave(told)

        return run


@contextlib.contextmanager
def without_device(launched: Callable[[Launched], object]) -> Iterator[Driver]:
    """Inside the block Triton launches clones of kernels on a `Driver`, which tells `launched` of each."""
    from triton.runtime import driver

    previous, found = driver._active, Driver(launched)
    driver.set_active(found)
    try:
        yield found
    finally:
        for kernel in _clones:
            for cache, *_ in kernel.device_caches.values():
                for compiled in cache.values():
                    compiled.module = None  # else the real driver would be asked to unload it
        _clones.clear()
        driver._active = previous


_clones: list[Any] = []


def clone(launch: runtime.Launch) -> runtime.Launch:
    """The launch of a kernel that is equal but knows of no device yet, for `without_device`."""
    from triton.runtime import JITFunction

    kernel = launch.kernel
    if type(kernel) is not JITFunction:
        raise RuntimeError(f"{kernel} was made for Triton's interpreter: run without TRITON_INTERPRET")
    runtime.settle_key(kernel)
    _clones.append(JITFunction(kernel.fn, do_not_specialize=kernel.do_not_specialize))
    return launch._replace(kernel=_clones[-1])


def launches() -> list[runtime.Launch]:
    """The backward pass of add + LayerNorm with all that it may do, attention forward, a linear with GELU."""
    rows, width, low = 64, 384, torch.bfloat16
    x, residual, parameter = (torch.zeros(shape) for shape in ((rows, width), (rows, width), width))
    seed, branch, qkv = torch.zeros(1, dtype=torch.int64), x.to(low), torch.zeros(2, 52, 3 * width, dtype=low)
    q, k, v = qkv.chunk(3, dim=-1)
    with runtime.recording((9, 0)) as recording:
        norm.backward(
            branch, x, residual, parameter, torch.zeros(2, rows), seed, 26, x_dtype=low,
            residual_dtype=torch.float32, parameters=True, x_bias=True, rows=branch, bias=parameter,
            extra=[branch, branch],
        )  # fmt: skip
        attention.forward(q, k, v, parameter, parameter, q.contiguous(), None, 6, 26, seed, 0)
        linear_gelu.forward(
            branch, branch.new_zeros(4 * width, width), branch.new_zeros(4 * width), keep_hidden=True
        )
    return recording.launches


def measure(rounds: int, calls: int = _CALLS) -> list[dict[str, Any]]:
    """A row a kernel: microseconds of CPU time a launch in each round, paths taking turns; JSON-ready.

    Args:
        rounds: in each, both paths make `calls` launches.
        calls:  of a path in a round.
    """
    rows = []
    with without_device(lambda launched: None):
        for launch in map(clone, launches()):
            call = launch.kernel, launch.grid, launch.arguments, launch.options, launch.constants
            paths = dict(zip(runtime.LAUNCHES, (runtime._through_triton, direct.launch), strict=True))
            runs = {
                path: functools.partial(cpu_microseconds, functools.partial(run, *call), calls)
                for path, run in paths.items()
            }
            times = in_turn(runs, rounds, warmup=_WARMUP)
            count = len(launch.arguments) + len(launch.constants)
            rows.append(dict(kernel=kernel_name(launch.kernel), arguments=count, microseconds=times))
    return rows
