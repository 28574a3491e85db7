"""Groups of ranks under torchrun that are made to fail: started, watched, killed, compared."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

import psutil
import torch
from pretrain_runs import ENVIRONMENT, curve

from lmim_fast.faults import VARIABLE
from lmim_fast.train.checkpoint import folders

# Without the switch torchrun's restarts can hang on gloo; the second makes its workers' output come at once.
SETTINGS = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONUNBUFFERED": "1"}
_STEP = re.compile(r"step (\d+)/\d+  loss")
_CONTINUING = re.compile(r"continuing .* from step (\d+)")
_FAULT = re.compile(r"fault: (kill|term|hang|raise|full) ")


class Group:
    """A training run under torchrun; no process of it is left after the block.

    Args:
        arguments: of `lmim pretrain`.
        run:       its `--output`, by which its processes are known.
        ranks:     processes.
        restarts:  of the whole group, by torchrun.
        faults:    what LMIM_FAST_FAULTS says.
    """

    def __init__(
        self, arguments: list[str], run: Path, *, ranks: int = 2, restarts: int = 0, faults: str = ""
    ) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self._command = [sys.executable, *launcher, f"--max-restarts={restarts}", "-m", "lmim_fast.pretrain"]
        self._command += arguments
        self._run, self._faults = run, faults
        self.lines: list[tuple[float, str]] = []
        """Output of all processes, each line with the moment that it came."""

    def __enter__(self) -> Self:
        self.launcher = subprocess.Popen(
            self._command,
            env={**SETTINGS, VARIABLE: self._faults},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.launcher.kill()  # first: it would restart them
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.launcher.wait(30)
        self._reader.join(30)

    def _read(self) -> None:
        assert self.launcher.stdout is not None
        with self.launcher.stdout as output:
            for text in output:
                self.lines.append((time.monotonic(), text.rstrip("\n")))

    @property
    def text(self) -> str:
        """All output so far."""
        return "\n".join(text for _, text in list(self.lines))

    def wait(self, limit: float = 120) -> int:
        """The launcher's exit code, after all output was read."""
        try:
            code = self.launcher.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit} s:\n{self.text}") from None
        self._reader.join(30)
        return code

    def wait_for(self, wanted: str, limit: float = 60) -> None:
        """Wait until a line of the output holds this text; fails if the run ends before."""
        until = time.monotonic() + limit
        while not any(wanted in text for _, text in list(self.lines)):
            ended = self.launcher.poll() is not None or time.monotonic() > until
            assert not ended, f"no {wanted!r}:\n{self.text}"
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        """Launcher and ranks that are alive, also ranks whose launcher is not."""
        return processes_of(self._run)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("RANK") == str(number):
                    return process
        raise AssertionError(f"rank {number} does not run:\n{self.text}")

    def kill(self) -> None:
        """Signal 9 to the launcher and to every rank, as when a machine goes down."""
        os.kill(self.launcher.pid, signal.SIGKILL)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def returns(self) -> list[tuple[int, float]]:
        """Of each restart: steps done again, and seconds from the fault to the next step or the end."""
        found: list[tuple[int, float]] = []
        done, since, repeated = 0, None, 0
        for moment, text in self.lines:
            if _FAULT.search(text):
                since, repeated = moment, done  # begun anew, unless it says from where it continues
            elif since is not None and (match := _CONTINUING.search(text)):
                repeated = done - int(match[1])
            elif (match := _STEP.match(text)) or text.startswith("finished: "):
                if since is not None:
                    found.append((repeated, moment - since))
                    since = None
                done = int(match[1]) if match else done
        return found


def processes_of(folder: Path) -> list[psutil.Process]:
    """Other processes that were started with this folder, or something in it, as an option."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            words = process.cmdline()
            named = str(folder) in words or any(word.startswith(f"{folder}/") for word in words)
            if named and process.pid != os.getpid():
                found.append(process)
    return found


def finish(arguments: list[str], run: Path, *, limit: float = 120) -> Path:
    """Run to the end without a fault; the run folder."""
    with Group(arguments, run) as group:
        assert group.wait(limit) == 0, group.text
    return run


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimiser of a checkpoint of any layout, every byte checked against its manifest."""
    found = folders.read(folders.folder_of(run, step))
    return {**found.model, **{f"optimizer {name}": tensor for name, tensor in found.optimizer.items()}}


def same_bits(run: Path, other: Path, step: int) -> bool:
    """Whether weights, optimiser and what is left of the runs after the last step are equal bit for bit."""
    found, wanted = tensors_of(run, step), tensors_of(other, step)
    exported = [(folder / "encoder.safetensors").read_bytes() for folder in (run, other)]
    return (
        exported[0] == exported[1]
        and found.keys() == wanted.keys()
        and all(_bits(found[name]) == _bits(wanted[name]) for name in found)
    )


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same_run(run: Path, other: Path, step: int) -> None:
    """Curves, weights and optimiser of two finished runs are equal bit for bit; no step is lost or twice."""
    assert [line["step"] for line in curve(run)] == list(range(1, step + 1))
    assert curve(run) == curve(other)
    assert same_bits(run, other, step)
