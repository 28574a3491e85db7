"""How one operation is timed: inputs beyond the cache, a CUDA graph of repetitions, and a floor beside it.

On CUDA a round replays a graph of `repetitions` calls on rotating copies of the inputs and waits for it; on
a CPU it calls them in turn. As many results as there are copies are kept alive, so that outputs rotate too.
Our forms are checked against plain PyTorch before they are timed.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import ceilings, floors
from benchmarks.correctness import assert_correct
from benchmarks.operation import DIRECTIONS as DIRECTIONS
from benchmarks.operation import Operation, Result, Unavailable, launches

Copy = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # inputs, and gradients of the outputs
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BATCHES = (512, 64, 8) if DEVICE.type == "cuda" else (8,)  # a CPU takes seconds a call at 64

_ROUNDS = {"cuda": 20, "cpu": 5}
_ROUND_SECONDS = {"cuda": 3e-3, "cpu": 5e-3}  # far above a launch, a wait, and the clock
_MOST_REPETITIONS = 200
_CPU_CACHE = 32 * 2**20
_MOST_COPIES = 64


@dataclass
class Settings:
    """Options of the command line (see conftest.py)."""

    compiled_batches: Sequence[int] = BATCHES
    budget: float = math.inf  # seconds
    start: float = field(default_factory=time.monotonic)


settings = Settings()
rows: list[dict[str, Any]] = []  # results of this process
_forms: dict[tuple[str, str], str] = {}  # what was checked
_repetitions = 1


def seconds_a_call() -> float:
    """The clock of the benchmarks: it runs slower by the repetitions of a round."""
    return time.perf_counter() / _repetitions


def measure(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    """Time `variant` of the operation, after checking it if it is ours, and file the result.

    Skips with the reason if this machine cannot run the variant; ends the session if the device is broken.
    """
    try:
        _measure(benchmark, operation, direction, variant)
    except Unavailable as error:
        pytest.skip(str(error))
    except torch.AcceleratorError as error:
        if _broken():
            pytest.exit(f"the device is beyond use: {error}", 3)
        raise


def _measure(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    if time.monotonic() - settings.start > settings.budget:
        raise Unavailable(f"the budget of {settings.budget:.0f} s is spent")
    timing = prepared(operation, direction, variant, copies_of(operation))
    _time(benchmark, timing.calls, timing.repetitions, f"{operation} {direction}")
    if benchmark.stats is None:  # --benchmark-disable
        return
    row = timing.row(benchmark.stats.stats.data)
    benchmark.extra_info.update({name: value for name, value in row.items() if name != "microseconds"})
    benchmark.extra_info.update(operation.sizes)
    rows.append(row)


@dataclass
class Timing:
    """A variant that is ready to be timed: a round of `repetitions` calls."""

    calls: Callable[[], None]
    repetitions: int
    about: dict[str, Any]  # the row without its times
    stages: tuple[floors.Work, ...]

    def row(self, times: Sequence[float]) -> dict[str, Any]:
        """JSON-ready, from the seconds of a call in each round."""
        return self.about | _row(times, self.stages) | dict(repetitions=self.repetitions)

    def measured(self) -> dict[str, Any]:
        """The row of as many rounds as the benchmarks have, without pytest-benchmark."""
        self.calls()
        times = []
        for _ in range(_ROUNDS[DEVICE.type]):
            start = time.perf_counter()
            self.calls()
            times.append((time.perf_counter() - start) / self.repetitions)
        return self.row(times)


def prepared(operation: Operation, direction: str, variant: str, copies: Sequence[Copy]) -> Timing:
    """Check the variant against plain PyTorch if it is ours, and capture its round on copies of the inputs.

    Raises:
        AssertionError: it is wrong.
        Unavailable:    this machine cannot run it; the message says why.
    """
    run = choose(operation, variant)
    form = check(operation, variant) if variant in operation.ours else variant
    stages = stages_of(operation, direction)
    try:
        calls, repetitions = round_of(run, copies, direction)
    except (RuntimeError, ImportError) as error:
        if _uncompiled(variant) not in operation.others:
            raise
        raise _unavailable(variant, error) from error
    about: dict[str, Any] = dict(operation=operation.name, sizes=operation.sizes, variant=variant, form=form)
    about |= dict(direction=direction, copies=len(copies), dtype=str(DTYPE).removeprefix("torch."))
    return Timing(calls, repetitions, about, stages)


def choose(operation: Operation, variant: str) -> Callable[..., Result]:
    """The callable of a variant.

    Raises:
        Unavailable: this machine cannot run it.
    """
    if variant in operation.ours:
        return operation.ours[variant]
    if variant == "eager":
        return operation.plain
    form = operation.plain if _uncompiled(variant) == "eager" else _other(operation, variant)
    if variant.startswith("compiled"):
        if DEVICE.type == "cpu" and not operation.leading:
            raise Unavailable("on a CPU only the leading size is compiled: it takes seconds each")
        if operation.sizes["batch"] not in settings.compiled_batches:
            batches = list(settings.compiled_batches)
            raise Unavailable(f"compiled at batches {batches} only: it takes seconds each")
        torch.compiler.reset()
        return torch.compile(lambda *inputs: form(*inputs), dynamic=False, fullgraph=True)
    return form


def _uncompiled(variant: str) -> str:
    """The variant that "compiled" and "compiled NAME" compile."""
    return variant.removeprefix("compiled").strip() or "eager"


def _other(operation: Operation, variant: str) -> Callable[..., Result]:
    """A third-party form, after one run of it."""
    name = _uncompiled(variant)
    if name not in operation.others:
        raise Unavailable(f"{operation.name} has no variant {variant}")
    try:
        operation.others[name](*operation.inputs(DEVICE, DTYPE))
    except (Unavailable, RuntimeError, ImportError) as error:
        raise _unavailable(variant, error) from error
    return operation.others[name]


def _unavailable(variant: str, error: Exception) -> Exception:
    """What to raise in place of the error of a variant: itself if it broke the device."""
    if isinstance(error, torch.AcceleratorError) and _broken():
        return error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return Unavailable(f"{variant} does not run this: {lines[0][:150]}")


def _broken() -> bool:
    """Whether the device does not answer any more: whatever followed would fail."""
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError:
        return True
    return False


def check(operation: Operation, variant: str) -> str:
    """Verify our form once; return what ran: the names of the kernels, or "PyTorch alone"."""
    key = str(operation), variant
    if key not in _forms:
        try:
            names = verify(operation, variant)
        except Unavailable as error:
            raise _unavailable(variant, error) from error
        _forms[key] = "kernels " + ", ".join(names) if names else "PyTorch alone"
    return _forms[key]


def verify(operation: Operation, variant: str) -> list[str]:
    """Check our form against plain PyTorch; return the names of the kernels that it launched.

    Raises:
        AssertionError: it is wrong.
        Unavailable:    this machine cannot run it.
    """
    with launches() as names:
        run = operation.ours[variant]
        assert_correct(run, operation.plain, operation.inputs, operation.sizes["p"], DEVICE, DTYPE)
    return list(dict.fromkeys(names))


def stages_of(operation: Operation, direction: str) -> tuple[floors.Work, ...]:
    """What the operation has to move and to compute in a direction."""
    return operation.passes(DTYPE.itemsize, direction != "forward").of(direction)


def copies_of(operation: Operation) -> list[Copy]:
    """Random inputs, as many sets as leave the cache behind."""
    return [_copy(operation) for _ in range(_copy_count(operation))]


def round_of(
    run: Callable[..., Result], copies: Sequence[Copy], direction: str
) -> tuple[Callable[[], None], int]:
    """A round of calls on the copies in turn, which waits for its end, and how many calls it has."""
    call = partial(_call, run, itertools.cycle(copies), direction, len(copies))
    return _prepare(call, len(copies) if DEVICE.type == "cuda" else 1)


def _copy(operation: Operation) -> Copy:
    inputs = operation.inputs(DEVICE, DTYPE)
    with torch.no_grad():
        outputs = _as_tuple(operation.plain(*inputs))
    return inputs, tuple(torch.randn_like(output) for output in outputs)


def _copy_count(operation: Operation) -> int:
    """Copies of the inputs that together are far beyond the cache: on CUDA three times as large.

    Inputs of a few bytes, whose operation takes a launch's time, are not copied so often.
    """
    size = sum(tensor.nbytes for tensor in operation.inputs(DEVICE, DTYPE))
    if DEVICE.type == "cpu":
        return min(8, _CPU_CACHE // size + 1)
    return min(_MOST_COPIES, torch.cuda.get_device_properties(DEVICE).L2_cache_size * 3 // size + 1)


def _call(run: Callable[..., Result], turns: Iterator[Copy], direction: str, alive: int, count: int) -> None:
    """Call `count` times; the last `alive` results live, so that a call does not write where the last did."""
    results: deque[object] = deque(maxlen=alive)
    for inputs, gradients in itertools.islice(turns, count):
        if direction == "forward":
            with torch.no_grad():
                results.append(run(*inputs))
        else:
            leaves = [tensor for tensor in inputs if tensor.requires_grad]
            outputs = _as_tuple(run(*inputs))
            results.append((outputs, torch.autograd.grad(outputs, leaves, gradients)))


def _prepare(call: Callable[[int], None], least: int) -> tuple[Callable[[], None], int]:
    """A round of `_ROUND_SECONDS` or so, and how many calls it has: at least `least`, whose time is taken."""
    _warm_up(call)
    calls = _round(call, least)
    calls()
    start = time.perf_counter()
    calls()
    rounds = _ROUND_SECONDS[DEVICE.type] / (time.perf_counter() - start)
    repetitions = max(least, min(_MOST_REPETITIONS, math.ceil(least * rounds)))
    return (calls if repetitions == least else _round(call, repetitions)), repetitions


def _warm_up(call: Callable[[int], None]) -> None:
    """Compile what is compiled at a first call, which a capture does not allow."""
    if DEVICE.type == "cpu":
        call(1)
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(3)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def _round(call: Callable[[int], None], repetitions: int) -> Callable[[], None]:
    """Makes the calls: on CUDA replays their graph, and waits."""
    if DEVICE.type == "cpu":
        return partial(call, repetitions)
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # a tensor that is freed while a capture goes on may end it
    with torch.cuda.graph(graph):
        call(repetitions)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def _time(benchmark: Any, calls: Callable[[], None], repetitions: int, group: str) -> None:
    global _repetitions
    _repetitions = repetitions
    benchmark.group = group
    benchmark.pedantic(calls, rounds=_ROUNDS[DEVICE.type], iterations=1, warmup_rounds=1)


def _row(times: Sequence[float], stages: Sequence[floors.Work]) -> dict[str, Any]:
    median, work = statistics.median(times), floors.total(stages)
    floor = floors.floor_seconds(stages, ceilings.measure(DEVICE, DTYPE))
    return dict(
        bytes=work.bytes,
        flops=work.flops,
        exponentials=work.exponentials,
        floor_us=floor * 1e6,
        percent_of_floor=100 * floor / median,
        gigabytes_per_second=work.bytes / median / 1e9,
        teraflops_per_second=work.flops / median / 1e12,
        microseconds=[seconds * 1e6 for seconds in times],
    )


def _as_tuple(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
