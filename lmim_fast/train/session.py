"""What one process trains with, where its run stands, and the times of a sitting."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmim_fast.config import RunConfig
from lmim_fast.data.batch import Batch
from lmim_fast.data.order import SampleOrder
from lmim_fast.owner import Owner
from lmim_fast.train import optim
from lmim_fast.train.checkpoint.saver import Saver
from lmim_fast.train.held_out import HeldOut
from lmim_fast.train.profiling import Trace
from lmim_fast.train.step import TrainStep
from lmim_fast.train.telemetry import Meter, Telemetry
from lmim_fast.train.validation import Validation
from lmim_fast.train.watchdog import Watchdog
from lmim_fast.train.world import World


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
    saver: Saver
    watchdog: Watchdog
    trace: Trace
    validation: Validation | None = None
    held_out: HeldOut | None = None
    bad_named: int = 0
    """Broken records of this process that are in bad_records.jsonl."""
    bad_records: int = 0
    """Distinct broken records that the run met; counted on rank 0."""
    saved_step: int | None = None
    """Step of the newest checkpoint."""
    score: float | None = None
    """Held-out loss of the weights as they are; None where it was not measured after the last step."""
    owner: Owner | None = None
    """Of the run folder; rank 0 has it."""


@dataclass
class Clock:
    """Times of this sitting and of the window that the next line of metrics covers."""

    before: float
    steps: int = 0
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.window_started = time.monotonic()

    def count(self, batch: Batch) -> Batch:
        """The batch, whose time of waiting is added up."""
        self.waited += batch.wait_seconds
        return batch

    def sitting(self) -> float:
        """Seconds of this sitting."""
        return time.monotonic() - self.started

    def elapsed(self) -> float:
        """Training time of the run, earlier sittings included."""
        return self.before + self.sitting()

    def close_window(self) -> tuple[float, float]:
        """Steps per second and share of the time spent waiting for data; starts the next window."""
        now = time.monotonic()
        seconds = max(now - self.window_started, 1e-9)
        rates = self.steps / seconds, min(1.0, self.waited / seconds)
        self.window_started, self.steps, self.waited = now, 0, 0.0
        return rates
