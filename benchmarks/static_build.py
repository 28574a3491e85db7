"""Compiles recorded kernel launches for a GPU that need not be there, and reads the result.

A launch is specialised by Triton's own code, as at a first call on that GPU: tensors and integers divisible
by 16, integers equal to 1, None. `ptxas` and `cuobjdump` are those inside Triton's wheel.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import wgmma
from lmim_fast.kernels import runtime

Case = tuple[str, Callable[[], object]]  # what is computed, a call of launch functions on meta tensors


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor and of a block; CUDA C++ Programming Guide, table of compute capabilities."""

    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    shared: int = 228 * 1024
    block_shared: int = 227 * 1024
    block_threads: int = 1024
    reserved: int = 1024  # shared memory that the system takes for each block
    tensor_columns: int = 0  # of tensor memory; only Blackwell has any

    def blocks_per_multiprocessor(self, registers: int, warps: int, shared: int, columns: int = 0) -> int:
        """Blocks that fit at once; registers come in units of 256 a warp, warps in fours."""
        of_a_warp = -(-registers * 32 // 256) * 256
        fitting = self.registers // of_a_warp // 4 * 4 if of_a_warp else self.warps
        by_memory = self.shared // (shared + self.reserved)
        by_columns = self.tensor_columns // columns if columns else self.blocks
        return min(self.blocks, self.warps // warps, fitting // warps, by_memory, by_columns)


ARCHES = {
    "sm_80": Limits(shared=164 * 1024, block_shared=163 * 1024),
    "sm_90": Limits(),
    "sm_100": Limits(tensor_columns=512),
}

_MMA = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"(?<![\w.])mma\.sync"}


@dataclass
class Build:
    """A specialised launch, and the cases that ask for it."""

    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any
    cases: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__}:{self.kernel.fn.__qualname__}"

    @property
    def key(self) -> str:
        """Equal where the compiler is given the same."""
        return f"{self.name} {self.signature} {self.constants} {self.attributes} {self.options}"

    @property
    def configuration(self) -> str:
        """Constants and dtypes by name, without those that are None."""
        names = list(self.signature)
        constants = {names[path[0]]: value for path, value in self.constants.items() if value is not None}
        values = ", ".join(f"{name}={getattr(value, 'value', value)}" for name, value in constants.items())
        dtypes = sorted({str(kind)[1:] for kind in self.signature.values() if str(kind).startswith("*")})
        return f"{'/'.join(dtypes)}; {values}"


@dataclass
class Report:
    """What the compiler made of a launch. Memory in bytes; `failures` is empty where all is well."""

    kernel: str
    configuration: str
    cases: list[str]
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_columns: int = 0
    threads: int = 0
    blocks_per_multiprocessor: int = 0
    warps_per_multiprocessor: int = 0
    products: int = 0
    mma: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def target_of(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def specialise(launch: runtime.Launch, target: Any) -> Build:
    """The launch as Triton's JIT would compile it on `target`."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(target)
    if not hasattr(kernel, "_pack_args"):
        raise RuntimeError(f"{kernel} was made for Triton's interpreter: run without TRITON_INTERPRET")
    runtime.settle_key(kernel)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = launch.options | {"debug": False}
    bound, specialization, options = bind(*launch.arguments, **launch.constants, **options)
    packed = kernel._pack_args(backend, options, bound, specialization, options)
    parsed, signature, constants, attributes = packed
    return Build(kernel, signature, constants, attributes, parsed)


class Selection(NamedTuple):
    """A module whose `cases()` yields cases, and a regular expression that their names match."""

    module: str
    only: str = ""


def record(selection: Selection, arch: str) -> list[Build]:
    """Every launch that the cases ask for on `arch`, each once; a case that is not for it returns why."""
    number = int(arch.removeprefix("sm_"))
    builds: dict[str, Build] = {}
    for label, call in importlib.import_module(selection.module).cases():
        if not re.search(selection.only, label):
            continue
        with runtime.recording((number // 10, number % 10)) as recording:
            refused = call()
        if not recording.launches and refused is None:
            raise RuntimeError(f"case {label!r} launches no kernel")
        for launch in recording.launches:
            build = specialise(launch, target_of(arch))
            known = builds.setdefault(build.key, build)
            if label not in known.cases:
                known.cases.append(label)
    return list(builds.values())


def compile_build(build: Build, arch: str) -> Report:
    """Compile for `arch` and report; a failed compilation is a failure in the report."""
    from triton.compiler import ASTSource, compile

    report = Report(build.name, build.configuration, build.cases)
    source = ASTSource(build.kernel, build.signature, build.constants, build.attributes)
    try:
        compiled = compile(source, target=target_of(arch), options=build.options.__dict__)
    except Exception as error:  # Triton has no one class for what its passes and ptxas raise
        report.failures.append(f"does not compile: {type(error).__name__}: {str(error).strip()[:500]}")
        return report
    _measure(report, compiled, ARCHES[arch])
    if torch.cuda.is_available():
        _build_launcher(compiled)
    return report


def _build_launcher(compiled: Any) -> None:
    """What a first launch would build besides: Triton 3.6 compiles a C function for each signature."""
    from triton.runtime import driver

    try:
        driver.active.launcher_cls(compiled.src, compiled.metadata)
    except Exception as error:  # it would only have saved the first launch some time
        print(f"no launcher for {compiled.src.fn.__name__}: {error}", file=sys.stderr)


def _measure(report: Report, compiled: Any, limits: Limits) -> None:
    report.registers, report.spilled = _resources(compiled.asm["cubin"])
    report.shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    report.tensor_columns = getattr(compiled.metadata, "tmem_size", None) or 0
    report.threads = 32 * warps
    report.blocks_per_multiprocessor = limits.blocks_per_multiprocessor(
        report.registers, warps, report.shared, report.tensor_columns
    )
    report.warps_per_multiprocessor = report.blocks_per_multiprocessor * warps
    report.products = _products(compiled.asm["ttir"])
    counts = {name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in _MMA.items()}
    report.mma = {name: count for name, count in counts.items() if count}
    report.failures += failures(report, limits)
    try:
        for operand in wgmma.hazards(compiled.asm["ptx"], report.shared):
            end = f"may be read past the end of the {report.shared} bytes of shared memory"
            report.failures.append(f"{operand}, {end}: see benchmarks/wgmma.py")
    except ValueError as error:  # another compiler may make descriptors in another way
        report.failures.append(f"its operands in shared memory are not known: {error}")


def failures(report: Report, limits: Limits) -> Iterator[str]:
    """What is wrong with a compiled kernel, with the numbers."""
    if report.spilled:
        yield f"spills {report.spilled} bytes a thread"
    if report.shared > limits.block_shared:
        yield f"takes {report.shared} bytes of shared memory, a block may have {limits.block_shared}"
    if report.tensor_columns > limits.tensor_columns:
        yield f"takes {report.tensor_columns} columns of tensor memory, there are {limits.tensor_columns}"
    if report.threads > limits.block_threads:
        yield f"runs {report.threads} threads, a block may have {limits.block_threads}"
    elif limits.blocks_per_multiprocessor(report.registers, report.threads // 32, 0) == 0:
        yield f"needs {report.threads} x {report.registers} registers, there are {limits.registers}"
    if report.products and not report.mma:
        yield f"does {report.products} products of 16-bit values without MMA instructions"


def _products(ttir: str) -> int:
    """`tl.dot`s of 16-bit values."""
    return len(re.findall(r"tt\.dot\b.*tensor<[0-9x]+x(?:f16|bf16)>\s*\*", ttir))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread: spilled values, and arrays that found no registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", line)) for line in output.splitlines()]
    found = [values for values in found if "REG" in values]
    if not found:
        raise RuntimeError(f"cuobjdump says nothing of registers: {output!r}")
    registers = max(int(values["REG"]) for values in found)
    return registers, max(int(values["STACK"]) + int(values["LOCAL"]) for values in found)


def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        raise FileNotFoundError(f"no {path}: this Triton comes without NVIDIA's tools")
    return str(path)


_builds: dict[str, list[Build]] = {}  # of a worker process, by arch


def prepare(selection: Selection, arches: list[str]) -> None:
    """Record all launches in a worker: kernels and their constants do not travel between processes."""
    _builds.update({arch: record(selection, arch) for arch in arches})


def compile_number(arch: str, number: int) -> Report:
    """Compile a recorded launch of this worker."""
    return compile_build(_builds[arch][number], arch)


def compile_all(selection: Selection, arches: list[str], jobs: int) -> Iterator[tuple[str, Report]]:
    """Reports of every launch on every arch, in order, from `jobs` processes."""
    prepare(selection, arches)
    for arch in arches:
        numbers = range(len(_builds[arch]))
        if jobs == 1:
            yield from ((arch, compile_number(arch, number)) for number in numbers)
            continue
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, prepare, (selection, [arch])) as pool:
            yield from ((arch, report) for report in pool.map(partial(compile_number, arch), numbers))
