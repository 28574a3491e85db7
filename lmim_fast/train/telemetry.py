"""What a run logs: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar.

The device is read once per logged line.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lmim_fast.data.console import SafeConsole
from lmim_fast.train.checkpoint.files import explain
from lmim_fast.train.side_files import METRICS_FILE, append
from lmim_fast.train.weights_biases import WandbRun

Value = float | int | None


@dataclass
class Meter:
    """The numbers of the steps since the last line of metrics.jsonl, left on the device until `read`.

    It is part of a checkpoint, so that a line's mean is the same after a resume.
    """

    loss_names: tuple[str, ...]
    steps: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    """Per step (k + 1,): the losses and the gradient norm; in a skipped step some are not finite."""
    skipped: int = 0
    """Steps without an update so far."""
    skipped_in_a_row: int = 0
    """Of them, the latest ones without a good step between."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of a row's numbers."""
        return (*self.loss_names, "grad_norm")

    def add(self, step: int, row: Tensor) -> None:
        """Keep the numbers of one step; nothing is read."""
        self.steps.append(step)
        self.rows.append(row)

    def read(self) -> list[list[float]]:
        """The kept rows as host numbers: waits for the device."""
        values: list[list[float]] = torch.stack(self.rows).tolist() if self.rows else []
        return values

    def longest_skipped(self) -> int:
        """Most skipped steps in a row up to one of the window's, or before it; waits for the device."""
        longest = in_a_row = self.skipped_in_a_row
        for row in self.read():
            in_a_row = 0 if all(map(math.isfinite, row)) else in_a_row + 1
            longest = max(longest, in_a_row)
        return longest

    def close_window(self) -> tuple[dict[str, Value], list[int]]:
        """Means over the window's finite steps, and its skipped steps; starts the next window."""
        rows = self.read()
        finite = [all(map(math.isfinite, row)) for row in rows]
        for good in finite:
            self.skipped += not good
            self.skipped_in_a_row = 0 if good else self.skipped_in_a_row + 1
        kept = [row for row, good in zip(rows, finite, strict=True) if good]
        lost = [step for step, good in zip(self.steps, finite, strict=True) if not good]
        means: dict[str, Value] = {
            name: math.fsum(row[i] for row in kept) / len(kept) if kept else None
            for i, name in enumerate(self.names)
        }
        self.steps, self.rows = [], []
        return means, lost

    def state(self) -> dict[str, Any]:
        """JSON-ready content; numbers that JSON lacks are None."""
        rows = [[value if math.isfinite(value) else None for value in row] for row in self.read()]
        return {
            "names": list(self.names),
            "steps": list(self.steps),
            "rows": rows,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], loss_names: tuple[str, ...], device: torch.device) -> Meter:
        """Inverse of `state`, for the losses that the task has."""
        meter = cls(loss_names, list(state["steps"]), [], state["skipped"], state["skipped_in_a_row"])
        # Older checkpoints have no names: these four, for every objective.
        stored = state.get("names", ["loss", "loss_recon", "loss_align", "grad_norm"])
        places = [stored.index(name) for name in meter.names]
        rows = [[math.nan if value is None else value for value in row] for row in state["rows"]]
        meter.rows = [torch.tensor([row[place] for place in places], device=device) for row in rows]
        return meter


class Telemetry:
    """Writes the curve of a run and shows its progress; a silent one (`run` None) for ranks other than 0.

    Args:
        run:        run folder, or None to write and show nothing.
        loss_names: names in the lines to log, the total first.
        total:      optimiser steps of the run.
        start_step: steps done before.
        wandb:      project of Weights & Biases to log to as well; None: none.
        config:     of the run, for that project.
    Raises:
        UsageError: (with `wandb`) its package is not installed.
        LmimError: the disk is full or a file of the run folder cannot be written.
    """

    def __init__(
        self,
        run: Path | None,
        loss_names: tuple[str, ...],
        *,
        total: int,
        start_step: int,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.loss_names = loss_names
        self.total = total
        self.started = time.monotonic()
        self.start_step = start_step
        self.console = SafeConsole(highlight=False, soft_wrap=True, quiet=run is None)
        self._bar: Progress | None = None
        self._board: Any = None
        self._wandb: WandbRun | None = None
        if run is None:
            return
        self._board = self._open_tensorboard(run, start_step)
        if wandb is not None:
            self._wandb = WandbRun(wandb, run, config or {}, self.say)
        if self.console.is_terminal:
            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=10),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self._task = self._bar.add_task("starting", total=total, completed=start_step)
            self._bar.start()

    def _open_tensorboard(self, run: Path, start_step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.say(f"warning: no TensorBoard files ({error}); pip install tensorboard")
            return None
        try:
            return SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        except UnicodeEncodeError:
            self.say(f"warning: no TensorBoard files: it cannot write to the name {run}, which is not UTF-8")
            return None
        except OSError as error:
            raise explain(error, run / "tensorboard") from error

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the bar; costs no device time."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, line: dict[str, Value]) -> None:
        """Append one line to metrics.jsonl and TensorBoard, and show it."""
        if self.run is None:
            return
        append(self.run / METRICS_FILE, [json.dumps(line, allow_nan=False)])
        step = int(line["step"] or 0)
        self._add_to_boards(line, step)
        if self._bar is not None:
            self._bar.update(self._task, description=describe(line, self.loss_names))
        else:
            rate = f"lr {line['lr']:.2e}  ETA {self._remaining(step)}"
            self.say(f"step {step}/{self.total}  {describe(line, self.loss_names)}  {rate}")

    def validated(self, line: dict[str, Any]) -> None:
        """Show the scores of a validation, and add them to the boards."""
        if self.run is None:
            return
        sets = {f"val/{name}": score["accuracy"] for name, score in line["sets"].items()}
        self._add_to_boards({"val/mean": line["accuracy"], **sets}, line["step"])
        each = "  ".join(f"{name.removeprefix('val/')} {value:.2%}" for name, value in sets.items())
        self.say(f"step {line['step']}/{self.total}  accuracy {line['accuracy']:.2%}  ({each})")

    def held_out(self, line: Mapping[str, Value]) -> None:
        """Show the loss of held-out crops, and add their losses to the boards."""
        if self.run is None:
            return
        step, loss = int(line["step"] or 0), line[self.loss_names[0]]
        self._add_to_boards({f"eval/{name}": line[name] for name in self.loss_names}, step)
        self.say(f"step {step}/{self.total}  held-out loss {'not finite' if loss is None else f'{loss:.3f}'}")

    def _add_to_boards(self, line: Mapping[str, Value], step: int) -> None:
        """Add numbers to TensorBoard and W&B, those that are there and finite."""
        if self._wandb is not None:
            self._wandb.log(line, step)
        if self._board is None or self.run is None:
            return
        try:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, step)
        except OSError as error:
            raise explain(error, self.run / "tensorboard") from error

    def _remaining(self, step: int) -> str:
        elapsed = time.monotonic() - self.started
        seconds = int(elapsed / max(1, step - self.start_step) * (self.total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as problem:  # the curve is in metrics.jsonl too: not worth hiding `error` for
                self.say(f"warning: TensorBoard files are incomplete ({problem})")
        if self._wandb is not None:
            self._wandb.finish(failed=error is not None)


def describe(line: dict[str, Value], loss_names: Sequence[str]) -> str:
    """A line of metrics.jsonl for the eye."""

    def number(name: str) -> str:
        value = line[name]
        return "-" if value is None else f"{value:.3f}"

    wait = line["data_wait_fraction"] or 0.0
    text = " ".join(f"{name.removeprefix('loss_')} {number(name)}" for name in loss_names)
    text += f"  {line['images_per_second']:.0f} images/s  data wait {100 * wait:.0f}%"
    extras = [f"{line[name]} {word}" for name, word in _COUNTS if line[name]]
    return "  ".join([text, *extras])


_COUNTS = (("bad_records", "bad records"), ("skipped_steps", "skipped steps"))


def memory_bytes(device: torch.device) -> int:
    """Peak memory: of the device's allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
