"""All operations that are timed, and the kernels they launch."""

from __future__ import annotations

import importlib
import pkgutil
import types
from collections.abc import Iterator
from pathlib import Path

from benchmarks import static_cases
from benchmarks.operation import Operation, kernel_name
from lmim_fast.kernels import runtime

SCRIPTS = (  # not of operations
    "bench_accelerate",
    "bench_checkpoint",
    "bench_data",
    "bench_gather",
    "bench_maps",
    "bench_parallel",
    "bench_step",
)
WHOLE = ("bench_host", "bench_reading")  # of a whole model, timed by pytest too


def modules() -> list[types.ModuleType]:
    """`bench_*.py`, those with operations."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    chosen = [name for name in names if name.startswith("bench_") and name not in SCRIPTS + WHOLE]
    return [importlib.import_module(f"benchmarks.{name}") for name in sorted(chosen)]


def every(batch: int) -> Iterator[Operation]:
    """Operations of every module at a batch size."""
    for module in modules():
        yield from module.operations(batch)


def symbols() -> list[str]:
    """All kernels as they are called on the device, where some modules share a name."""
    return sorted({name.rpartition(".")[2] for name in shipped_kernels()})


def shipped_kernels() -> set[str]:
    """Names of all kernels of the package, by the launches of `benchmarks/static_cases/`."""
    with runtime.recording((9, 0)) as recording:
        for _, call in static_cases.cases():
            call()
    return {kernel_name(launch.kernel) for launch in recording.launches}
