"""The training loop, from top to bottom. A step is a function of (weights, optimiser, seed, step)."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from lmim_fast.config import RunConfig
from lmim_fast.data.batch import Batch
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.errors import LmimError
from lmim_fast.train import optim
from lmim_fast.train.checkpoint import content
from lmim_fast.train.step import TrainStep
from lmim_fast.train.telemetry import Meter, Telemetry, Value, add_new_lines, memory_bytes
from lmim_fast.train.validation import Validation
from lmim_fast.train.world import World

# A bad batch or two pass; a run that diverged does not come back.
MAX_SKIPPED_IN_A_ROW = 20


@dataclass
class Progress:
    """Where a run stands: with weights and optimiser, all that a resume needs."""

    meter: Meter
    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Training time of the sittings before this one."""

    @classmethod
    def from_state(cls, state: dict[str, Any], loss_names: tuple[str, ...], device: torch.device) -> Progress:
        """What a checkpoint's state.json says."""
        meter = Meter.from_state(state["meter"], loss_names, device)
        return cls(meter, state["step"], state["seconds"])


@dataclass
class Session:
    """Everything one process trains with."""

    config: RunConfig
    run: Path
    world: World
    model: nn.Module
    optimizer: optim.SkippingAdamW
    run_step: TrainStep
    order: SampleOrder
    progress: Progress
    telemetry: Telemetry
    identity: dict[str, Any]
    """What every checkpoint of this run says of it: config, versions, data, seed, teacher."""
    validation: Validation | None = None
    bad_named: int = 0
    """Broken records of this process that are in bad_records.jsonl."""
    bad_records: int = 0
    """Distinct broken records that the run met; counted on rank 0."""


def train(session: Session, batches: ViewPipeline) -> int:
    """Train from `session.progress.step` to the end of the run; a checkpoint is written before it returns.

    Args:
        batches: micro batches in training order, from that step on.
    Returns:
        0 when the run is complete, or the number of the signal that stopped it.
    Raises:
        LmimError: too many steps in a row were not finite, or a part failed on some rank.
    """
    config, world, progress, telemetry = session.config, session.world, session.progress, session.telemetry
    total = optim.total_steps(config, session.order.num_samples)
    warmup = optim.warmup_steps(config, session.order.num_samples)
    peak = optim.peak_learning_rate(config)
    schedule, final = config.optim.schedule, config.optim.final_lr
    clock = _Clock(progress.seconds)

    def micro_batches() -> Iterator[Batch]:
        for _ in range(config.accumulation):
            batch = _next_batch(session, batches)
            clock.waited += batch.wait_seconds
            yield batch

    with _stop_signals() as stop_signals:
        while progress.step < total:
            step = progress.step
            lr = optim.learning_rate(
                step, peak=peak, warmup=warmup, total=total, schedule=schedule, final=final
            )
            row = session.run_step(step, micro_batches(), lr)

            progress.step = step + 1
            progress.meter.add(progress.step, row)
            clock.steps += 1
            telemetry.advance(progress.step)
            if progress.step % config.log_every == 0 or progress.step == total:
                _log(session, batches, clock, lr)
            if session.validation is not None and session.validation.is_due(progress.step, total):
                _validate(session, session.validation)
            stop = world.largest(stop_signals.received)
            if stop or progress.step % config.checkpoint_every == 0 or progress.step == total:
                _save(session, batches, clock)
            if stop:
                return stop if progress.step < total else 0
    return 0


def _next_batch(session: Session, batches: ViewPipeline) -> Batch:
    """The next batch; where there is none on some rank, all raise, after the broken records are named."""
    try:
        with session.world.together():
            return next(batches)
    except Exception:
        try:
            _name_bad_records(session, batches)
        except LmimError as problem:  # not worth hiding the failure for
            session.telemetry.say(f"warning: {problem}")
        raise


@dataclass
class _Clock:
    """Times of this sitting and of the window that the next line of metrics covers."""

    before: float
    steps: int = 0
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.window_started = time.monotonic()

    def elapsed(self) -> float:
        """Training time of the run, earlier sittings included."""
        return self.before + time.monotonic() - self.started

    def close_window(self) -> tuple[float, float]:
        """Steps per second and share of the time spent waiting for data; starts the next window."""
        now = time.monotonic()
        seconds = max(now - self.window_started, 1e-9)
        rates = self.steps / seconds, min(1.0, self.waited / seconds)
        self.window_started, self.steps, self.waited = now, 0, 0.0
        return rates


def _log(session: Session, batches: ViewPipeline, clock: _Clock, lr: float) -> None:
    """Read the window's numbers, write their line, and stop a run that no longer trains."""
    config, world, progress = session.config, session.world, session.progress
    means, skipped = progress.meter.close_window()
    steps_per_second, data_wait = clock.close_window()
    _name_bad_records(session, batches)
    line: dict[str, Value] = {
        "step": progress.step,
        "epoch": progress.step * config.batch_size / session.order.num_samples,
        **means,
        "lr": lr,
        "images_per_second": steps_per_second * config.batch_size,
        "data_wait_fraction": data_wait,
        "bad_records": session.bad_records,
        "skipped_steps": progress.meter.skipped,
        "memory_bytes": memory_bytes(world.device),
        "elapsed_seconds": clock.elapsed(),
    }
    with world.together():
        if world.is_main:
            _write(session, line, skipped)
    in_a_row = progress.meter.skipped_in_a_row
    if in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise LmimError(
            f"loss or gradient was not finite in the last {in_a_row} steps up to {progress.step}: start "
            "again in another --output with a lower --optim.lr, --optim.clip-norm or --precision fp32; "
            f"the steps are listed in {session.run / 'skipped.jsonl'}"
        )


def _validate(session: Session, validation: Validation) -> None:
    """Measure the model, its averaged weights if there are any, and keep it if it is the best so far."""
    with optim.averaged_weights(session.optimizer):
        line = validation(session.model, session.progress.step)
    if line is not None:
        session.telemetry.validated(line)


def _name_bad_records(session: Session, batches: ViewPipeline) -> None:
    """Name and count the broken records that the ranks have met since the last time; all ranks call it."""
    known = list(batches.bad.entries)  # it grows meanwhile
    new, session.bad_named = known[session.bad_named :], len(known)
    ranks = session.world.gather((batches.bad.count, new))
    with session.world.together():
        if session.world.is_main:
            entries = [entry._asdict() for _, entries in ranks for entry in entries]
            named = add_new_lines(session.run / "bad_records.jsonl", entries)
            session.bad_records = max(named, *(count for count, _ in ranks))


def _write(session: Session, line: dict[str, Value], skipped: list[int]) -> None:
    """Write one line of metrics, and name the skipped ones of its steps."""
    session.telemetry.log(line)
    if skipped:
        # Seed, epoch and index replay a sample's views and mask.
        order = session.order
        samples = {step: [array.tolist() for array in order.batch(step - 1)] for step in skipped}
        add_new_lines(
            session.run / "skipped.jsonl",
            [
                {"step": step, "seed": order.seed, "epochs": epochs, "indices": indices}
                for step, (epochs, indices) in samples.items()
            ],
        )
        session.telemetry.say(f"warning: skipped {len(skipped)} steps whose loss or gradient was not finite")


def _save(session: Session, batches: ViewPipeline, clock: _Clock) -> None:
    """Write a checkpoint, and what is known of broken records by then; every rank waits for it."""
    _name_bad_records(session, batches)
    progress = session.progress
    state = {
        **session.identity,
        "step": progress.step,
        "meter": progress.meter.state(),
        "seconds": clock.elapsed(),
    }
    with session.world.together():
        if session.world.is_main:
            keep = session.config.keep_checkpoints
            path = content.save(session.run, state, session.model, session.optimizer, keep=keep)
            session.telemetry.say(f"checkpoint {path}")


class _StopSignals:
    """Remembers a request to stop until the step is done."""

    received = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Signal handler; a second Ctrl-C does not wait."""
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


@contextlib.contextmanager
def _stop_signals() -> Iterator[_StopSignals]:
    """SIGTERM, SIGUSR1 and Ctrl-C end the run after a checkpoint, at the next step's end."""
    handler = _StopSignals()
    previous = {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield handler
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
