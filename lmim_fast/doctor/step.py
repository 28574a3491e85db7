"""A step of a run's own model, batch and optimiser: its time and its memory."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lmim_fast.data.batch import Batch
from lmim_fast.doctor.machine import available_memory
from lmim_fast.doctor.plan import Plan
from lmim_fast.train import optim, parallel
from lmim_fast.train.memory import explain_out_of_memory
from lmim_fast.train.step import TrainStep
from lmim_fast.train.tasks import make_task

_BUDGET = 8.0  # seconds of all steps on a CPU
_PILOT = 4  # images of the pass that says how many fit in it
_STEPS = {"cpu": (1, 2), "cuda": (3, 5)}  # to warm up, and to be timed


class OutOfMemory(Exception):
    """What to do where a step does not fit."""


@dataclass(frozen=True)
class Measured:
    """What one pass and its update take, for all images of a pass."""

    images: int
    """Of the passes that were timed; fewer than those of the run where these would take too long."""
    seconds: float
    peak: int
    """Bytes: of the GPU's allocator, or of the process."""
    limit: int
    """Bytes that it can have."""
    finite: bool


def measure(plan: Plan, batch: Batch | None) -> Measured:
    """Run a few steps on real views, or on zeros where there is no batch.

    Raises:
        OutOfMemory: a step does not fit; says how many images would.
    """
    model, device = plan.model, plan.world.device
    assert model is not None
    try:
        return _Trial(plan, batch)()
    except RuntimeError as error:
        cause = _out_of_memory(error)
        if cause is not None:
            told = explain_out_of_memory(cause, None, plan.task, model, plan.config, plan.world)
            raise OutOfMemory(str(told)) from None
        if device.type == "cpu" and "can't allocate memory" in str(error):
            advice = "pass a larger --accumulation, or a smaller --preset"
            raise OutOfMemory(f"a step does not fit in memory: {advice}") from None
        raise


def _out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The GPU's own error: the end of a graph's capture raises another one over it."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error


class _Trial:
    """The model with its optimiser, ready for steps."""

    def __init__(self, plan: Plan, batch: Batch | None) -> None:
        assert plan.model is not None
        self._plan, self._device = plan, plan.world.device
        self._batch = batch if batch is not None else plan.task.blank_batch(plan.images, self._device)
        config = dataclasses.replace(
            plan.config,
            batch_size=plan.images,
            parallel="replicate",
            shard_size=0,
            reshard=False,
            compile=False,
            # Of several passes no graph is made.
            cuda_graph="off" if plan.config.accumulation > 1 else plan.config.cuda_graph,
            accumulation=1,
        )
        config = parallel.settle(config, plan.model, plan.alone)
        task = make_task(config)
        parallel.apply(plan.model, config, plan.alone)
        graphed = self._device if config.cuda_graph == "on" else None
        optimizer = optim.make_optimizer(task.parameter_groups(plan.model), config.optim, graphed=graphed)
        self._step = TrainStep(plan.model.train(), optimizer, task, plan.alone)
        self._graphed = graphed is not None

    def __call__(self) -> Measured:
        try:
            return self._on_gpu() if self._device.type == "cuda" else self._on_cpu()
        finally:
            self._step.release()

    def _on_gpu(self) -> Measured:
        torch.cuda.reset_peak_memory_stats(self._device)
        if self._graphed:
            self._step.capture_graph()
        warm_up, timed = _STEPS["cuda"]
        self._steps(self._batch, warm_up)
        seconds, finite = self._steps(self._batch, timed)
        peak = torch.cuda.max_memory_reserved(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        limit = free + torch.cuda.memory_reserved(self._device)
        return Measured(self._plan.images, seconds, peak, limit, finite)

    def _on_cpu(self) -> Measured:
        """With as many images as the budget allows; time and memory are taken to grow with them."""
        pilot = min(_PILOT, self._plan.images)
        self._steps(self._batch_of(pilot), 1)  # makes the moments
        first = self._scaled(pilot, 1)
        seconds = first.seconds * pilot / self._plan.images
        images = min(self._plan.images, int(pilot * _BUDGET / (sum(_STEPS["cpu"]) * seconds)))
        if images <= pilot:
            return first
        self._steps(self._batch_of(images), _STEPS["cpu"][0])
        return self._scaled(images, _STEPS["cpu"][1])

    def _scaled(self, images: int, count: int) -> Measured:
        """What steps of some of the images take, and from that those of all."""
        scale = self._plan.images / images
        begin = _resident("VmRSS")
        limit = available_memory() + begin
        _forget_peak()
        seconds, finite = self._steps(self._batch_of(images), count)
        peak = begin + int(max(0, _resident("VmHWM") - begin) * scale)
        return Measured(images, scale * seconds, peak, limit, finite)

    def _batch_of(self, images: int) -> Batch:
        """The first images of the batch."""
        return self._batch.with_tensors([tensor[:images] for tensor in self._batch.tensors()])

    def _steps(self, batch: Batch, count: int) -> tuple[float, bool]:
        """Seconds of one of `count` steps, and whether its numbers are finite; no weight changes."""
        self._wait()
        start = time.perf_counter()
        for number in range(count):
            row = self._step(number, iter([batch]), 0.0)
        self._wait()
        return (time.perf_counter() - start) / count, bool(row.isfinite().all())

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at the peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def _forget_peak() -> None:
    """Let VmHWM begin anew; where the kernel does not allow that, it is the peak of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
