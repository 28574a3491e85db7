"""All operations that are timed, and the kernels they launch."""

from __future__ import annotations

import importlib
import pkgutil
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from lmim_fast.kernels import runtime

if TYPE_CHECKING:
    from benchmarks.harness import Operation

SCRIPTS = ("bench_data", "bench_step")  # not of operations


def modules() -> list[types.ModuleType]:
    """`bench_*.py`, those with operations."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    chosen = [name for name in names if name.startswith("bench_") and name not in SCRIPTS]
    return [importlib.import_module(f"benchmarks.{name}") for name in sorted(chosen)]


def every(batch: int) -> Iterator[Operation]:
    """Operations of every module at a batch size."""
    for module in modules():
        yield from module.operations(batch)


def kernel_name(kernel: Any) -> str:
    """`module.function` of a function under `triton.jit`, compiled or interpreted."""
    function = kernel.fn
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


@contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the kernels that are launched inside, in order."""
    names: list[str] = []
    launch = runtime.launch

    def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.append(kernel_name(kernel))
        launch(kernel, *arguments, **options)

    with mock.patch.object(runtime, "launch", counted):
        yield names


def symbols() -> list[str]:
    """All kernels as they are called on the device, where some modules share a name."""
    return sorted({name.rpartition(".")[2] for name in shipped_kernels()})


def shipped_kernels() -> set[str]:
    """Names of all kernels of the package, by the launches of `benchmarks/static_cases/`."""
    from benchmarks import static_cases

    with runtime.recording((9, 0)) as recording:
        for _, call in static_cases.cases():
            call()
    return {kernel_name(launch.kernel) for launch in recording.launches}
