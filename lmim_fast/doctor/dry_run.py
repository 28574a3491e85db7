"""A few batches and a few steps of the run, and from them its time and memory. Nothing is written."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from lmim_fast.doctor.findings import Findings
from lmim_fast.doctor.machine import amount
from lmim_fast.doctor.plan import Plan

if TYPE_CHECKING:
    from lmim_fast.data.batch import Batch

_SECONDS = 2.0  # that batches are counted for
_LONGEST = 20.0  # seconds that the batches are waited for in all, as long as one came


def check_model(plan: Plan, findings: Findings) -> None:
    """Build the model and load what the run starts from; it becomes the plan's."""
    with findings.check("model"):
        plan.model = plan.task.build()
        trained = sum(p.numel() for p in plan.model.parameters() if p.requires_grad)
        findings.ok("model", f"{trained:,} trainable parameters")
    if plan.model is None:
        return
    with findings.check("weights"):
        if plan.continued:
            text = f"the run goes on from step {plan.continued:,} with its own weights and teacher"
            findings.ok("weights", text)
        else:
            plan.task.check()
            said: list[str] = []
            plan.task.start(plan.model, said.append)
            for line in said:
                level = findings.warning if line.startswith("warning: ") else findings.ok
                level("weights", line.removeprefix("warning: "))


def check_batches(plan: Plan, findings: Findings) -> Batch | None:
    """Make batches of one process for a few seconds; the last one."""
    if plan.store is None:
        return None
    batch: Batch | None = None
    with findings.check("batches"):
        from lmim_fast.train.tasks import make_task

        # How many records are broken is said elsewhere.
        loader = dataclasses.replace(plan.config.loader, max_bad_fraction=1.0)
        config = dataclasses.replace(plan.config, batch_size=plan.images, accumulation=1, loader=loader)
        task = make_task(config)
        begin = time.monotonic()
        ready = 2 * loader.prefetch + 1  # batches that may be finished when the first one is taken
        with task.pipeline(plan.store, task.order(plan.store), plan.alone, 0, 10**6) as batches:
            batch = next(batches)
            first = time.monotonic() - begin
            for _ in range(ready - 1):
                if time.monotonic() - begin < _LONGEST / 2:
                    batch = next(batches)
            start, count = time.monotonic(), 0
            while not count or time.monotonic() - start < _SECONDS:
                batch = next(batches)
                count += 1
            rate = count * plan.images / (time.monotonic() - start)
        findings.figures |= {"data_images_per_second": rate, "first_batch_seconds": first}
        findings.ok(
            "batches", f"{_rate(rate)} a process, {loader.threads} threads; the first in {first:.1f} s"
        )
    return batch


def check_step(plan: Plan, batch: Batch | None, findings: Findings) -> None:
    """Train a few steps, and say what the run will take. Changes the plan's model, in memory alone."""
    if plan.model is None:
        return
    with findings.check("step"):
        from lmim_fast.doctor.step import OutOfMemory, measure

        try:
            measured = measure(plan, batch)
        except OutOfMemory as error:
            findings.error("step", str(error))
            return
        on = "" if batch is not None else " of zeros, as there is no data,"
        part = "" if measured.images == plan.images else f", scaled from passes of {measured.images} images"
        findings.ok("step", f"a pass of {plan.images} images{on} takes {measured.seconds:.3g} s{part}")
        if plan.config.compile:
            findings.ok("step", "measured without --compile, which would take minutes here")
        if not measured.finite:
            advice = "look at the weights that it starts from, and at --precision"
            findings.error("step", "its loss or gradient is not finite", advice)
        _memory(plan, measured.peak, measured.limit, findings)
        _time(plan, measured.seconds, findings)


def _memory(plan: Plan, peak: int, limit: int, findings: Findings) -> None:
    findings.figures |= {"memory_peak_bytes": peak, "memory_limit_bytes": limit}
    processes = "" if plan.world.device.type == "cuda" or plan.world.size == 1 else " for each process"
    needed = peak * (1 if plan.world.device.type == "cuda" else plan.world.size)
    text = f"{amount(peak)} at the peak{processes}, {amount(limit)} can be had"
    if plan.config.parallel in ("shard", "hybrid"):
        text += f"; measured without --parallel {plan.config.parallel}, which takes less"
    if needed > 0.9 * limit:
        findings.warning(
            "step memory", text, "a larger --accumulation takes less, as does --activation-checkpointing"
        )
    else:
        findings.ok("step memory", text)


def _time(plan: Plan, seconds: float, findings: Findings) -> None:
    """Steps x time, whichever of data and model is slower; on a CPU they take turns on its cores."""
    from lmim_fast.train.optim import total_steps

    config, data = plan.config, findings.figures.get("data_images_per_second")
    if data is not None:
        making = plan.images / data
        if making > seconds:
            text = f"data is the bottleneck: {_rate(data)} made, {_rate(plan.images / seconds)} could be used"
            findings.warning(
                "speed", text, "more CPU cores for each process, --loader.threads, or smaller crops"
            )
        seconds = max(seconds, making) if plan.world.device.type == "cuda" else seconds + making
    step = seconds * config.accumulation
    findings.figures |= {"step_seconds": step, "images_per_second": config.batch_size / step}
    speed = _rate(config.batch_size / step)
    if plan.world.size > 1:
        speed += f" over {plan.world.size} processes, without their messages"
    if plan.store is None and config.steps is None:
        findings.ok("time", f"{step:.3g} s a step, {speed}; without data the number of steps is not known")
        return
    total = total_steps(config, len(plan.store) if plan.store is not None else 1)
    left = max(0, total - plan.continued)
    findings.figures |= {"steps": left, "run_seconds": left * step}
    if not left:
        findings.ok(
            "time", f"the run has made its {total:,} steps; one more would take {step:.3g} s, {speed}"
        )
        return
    steps = f"{left:,} steps" + (f" left of {total:,}" if plan.continued else "")
    findings.ok("time", f"{steps} x {step:.3g} s = {_duration(left * step)}, {speed}")


def _rate(images: float) -> str:
    """Images per second in three digits or all whole ones."""
    return f"{images:,.0f} images/s" if images >= 100 else f"{images:.3g} images/s"


def _duration(seconds: float) -> str:
    """In the two largest units."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days} d {hours_left} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
