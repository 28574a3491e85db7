"""A chrome trace of some steps of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 10
"""Steps before the recording: what happens only once, such as compiling, is over by then."""


class Trace:
    """Records some steps and writes them once; context manager around the steps.

    The file is RUN/trace-rank{rank}.json.gz, whole or absent; Perfetto and chrome://tracing read it as it is.
    A run that ends while it records leaves the steps until then. A file that cannot be written is said, and
    training goes on.

    Args:
        run:    folder of the run.
        rank:   of this process.
        steps:  to record, after `SKIPPED` others; 0: the object does nothing.
        device: of the model; on CUDA the work of the GPU is recorded too.
        say:    is told where the file is, or why there is none.
    """

    def __init__(
        self, run: Path, rank: int, steps: int, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._path, self._say = run / f"trace-rank{rank}.json.gz", say
        self._written = False
        self._profile: profile | None = None
        if not steps:
            return
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            # The last skipped step warms the profiler up.
            schedule=schedule(skip_first=SKIPPED - 1, wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,  # the same for one cycle, without a warning of torch 2.11
        )

    def __enter__(self) -> Trace:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._stop()
            if not self._written:
                self._say(f"no trace was written: there were not more than {SKIPPED} steps")

    def step(self) -> None:
        """A step is done."""
        if self._profile is not None:
            self._profile.step()
            if self._written:
                self._stop()

    def _stop(self) -> None:
        assert self._profile is not None
        profiler, self._profile = self._profile, None
        profiler.stop()

    def _write(self, profiler: profile) -> None:
        steps = profiler.step_num - SKIPPED
        if steps < 1 or self._written:
            return
        self._written = True  # or said that it cannot be
        try:
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=self._path.parent) as folder:
                partial = Path(folder) / self._path.name  # its ending says how it is packed
                profiler.export_chrome_trace(str(partial))
                partial.replace(self._path)
        except (OSError, RuntimeError) as error:  # the second is what the recorder in C++ raises
            self._say(f"warning: no trace in {self._path}: {error}")
        else:
            self._say(f"trace of {steps} steps in {self._path}")
