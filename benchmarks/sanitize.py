"""compute-sanitizer over one pass of every kernel: bad memory accesses (memcheck), races (racecheck).

    python -m benchmarks.sanitize [--tool memcheck] [--tool racecheck] [--seconds N] [--only REGEX]
                                  [--report racecheck] [--results FILE]

Each tool also runs over a kernel with a fault: if it does not find that, nothing that it says counts. All
runs go side by side; only our kernels are instrumented. Exit code 0: no tool found anything, and each found
its planted fault; 1: else; 3: there is no compute-sanitizer, or no CUDA device. What a tool under `--report`
finds is told, and does not count.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch

from benchmarks import harness, kernel_pass, operations
from benchmarks.machine import ABSENT, Record
from benchmarks.planted_faults import FAULTS

ROOT = Path(__file__).parents[1]
TOOLS = tuple(FAULTS)
FOUND = 77  # compute-sanitizer's exit code where it found something; Python has no use for it
_NOTHING = re.compile(r"^========= (ERROR|RACECHECK) SUMMARY: 0 ", re.MULTILINE)  # so it has looked
_KEPT_LINES = 60  # of a tool's, in the result
_PORTS = 49152, 100  # the first, and how far those of two runs are apart


def find() -> str | None:
    """compute-sanitizer: on PATH, of the CUDA toolkit, or of the package nvidia-cuda-sanitizer-api."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    spec = find_spec("nvidia")
    wheels = list(spec.submodule_search_locations or ()) if spec else []
    folders = [str(folder) for wheel in wheels for folder in sorted(Path(wheel).glob("cu*/bin"))]
    path = os.pathsep.join([os.environ.get("PATH", ""), f"{toolkit}/bin", *folders])
    return shutil.which("compute-sanitizer", path=path)


@dataclass
class Run:
    """A process under a tool. `planted`: it has a fault that has to be found."""

    tool: str
    planted: bool
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    stopped: bool = False
    text: str = ""
    """All that it printed, once it has ended."""

    def verdict(self) -> str:
        """What came of it; begins with "ok" where all is well."""
        code, text = self.process.returncode, self.text
        of_tool = "".join(line for line in text.splitlines() if line.startswith("========="))
        lines = [line for line in text.splitlines() if not line.startswith("=========")]
        last = lines[-1] if lines else "it printed nothing"
        if self.stopped:
            return f"RED: stopped, the time was up: {last}"
        if self.planted:
            if kernel_pass.PLANTED not in lines:
                return f"RED: the fault was not launched (exit code {code}): {last}"
            found = code == FOUND and FAULTS[self.tool].fn.__name__ in of_tool
            return "ok, found the planted fault" if found else f"RED: missed it (exit code {code})"
        if code == FOUND:
            return "RED: found something"
        if code != 0 or kernel_pass.DONE not in lines:
            return f"RED: exit code {code}: {last}"
        if not _NOTHING.search(text):
            return "RED: the tool does not say that it found nothing: it may not have looked"
        checked = sum(": right, " in line for line in lines)
        return f"ok, nothing found in {checked} operations"


def command(sanitizer: str, tool: str, *, planted: bool, only: str) -> list[str]:
    """One run. The exit code tells of faults alone: a failing program keeps its own.

    The tool waits for the program however long that takes to start: else it would run on without the tool.
    Runs that go side by side have ports of their own.
    """
    names = [FAULTS[tool].fn.__name__] if planted else operations.symbols()
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--check-exit-code", "no"]
    options += ["--target-processes", "application-only", "--print-limit", "20", "--launch-timeout", "0"]
    first, apart = _PORTS
    options += ["--port", str(first + apart * (2 * TOOLS.index(tool) + planted))]
    if tool == "memcheck":  # PyTorch asks for what is not there and goes on; tensors lie side by side
        options += ["--report-api-errors", "no", "--padding", "512"]
    for name in names:
        options += ["--kernel-name", f"kernel_name={name}"]
    worker = [sys.executable, "-m", "benchmarks.kernel_pass", "--only", only]
    return [sanitizer, *options, *worker, *(["--planted", tool] if planted else [])]


def start(command_line: list[str], tool: str, *, planted: bool) -> Run:
    """Begin a run; every tensor gets memory of its own, so that an access beside it shows."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the run
    process = subprocess.Popen(
        command_line, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
    )
    return Run(tool, planted, process, output)


def wait(runs: list[Run], seconds: float) -> None:
    """Until all have ended, or for so many seconds."""
    deadline = time.monotonic() + seconds
    for run in runs:
        with suppress(subprocess.TimeoutExpired):
            run.process.wait(max(0.0, deadline - time.monotonic()))


def end(runs: list[Run]) -> None:
    """Kill what still runs, and whatever a run has left behind."""
    for run in runs:
        run.stopped = run.process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()
        with run.output as output:
            output.seek(0)
            run.text = output.read().decode(errors="replace")


def tell(runs: list[Run], record: Record, reported: Sequence[str]) -> int:
    """Print what the runs have said, then the verdicts, and file them; 1 if one that counts is red."""
    verdicts = [(f"{run.tool}{', planted' if run.planted else ''}", run.verdict()) for run in runs]
    for run, (name, _) in zip(runs, verdicts, strict=True):
        print(f"--- {name}\n{run.text}")
    for run, (name, verdict) in zip(runs, verdicts, strict=True):
        print(f"sanitize: {name}: {verdict}", flush=True)
        found = [line for line in run.text.splitlines() if line.startswith("=========")]
        record.add(
            dict(run=name, verdict=verdict, counts=run.tool not in reported, found=found[:_KEPT_LINES])
        )
        if not verdict.startswith("ok") and run.tool not in reported:
            record.fail(verdict, run=name)
    record.result["headline"] = "; ".join(f"{name}: {verdict}" for name, verdict in verdicts)
    return record.end()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: all")
    parser.add_argument("--seconds", type=float, default=600, help="what still runs then is stopped, and red")
    parser.add_argument("--only", default="", help="a regular expression for the names of operations")
    parser.add_argument("--report", nargs="*", choices=TOOLS, default=(), help="tools that do not count")
    parser.add_argument("--results", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    sanitizer = find()
    if sanitizer is None:
        print("sanitize: no compute-sanitizer (pip install nvidia-cuda-sanitizer-api)", file=sys.stderr)
        return ABSENT
    if not torch.cuda.is_available():
        print(f"sanitize: torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return ABSENT
    record = Record(args.results, "sanitize", harness.DEVICE)
    runs: list[Run] = []
    try:
        for tool in args.tool or TOOLS:
            for planted in (False, True):
                line = command(sanitizer, tool, planted=planted, only=args.only)
                runs.append(start(line, tool, planted=planted))
        wait(runs, args.seconds - (time.monotonic() - begun))
    finally:  # what they found by an interruption is told too
        end(runs)
        code = tell(runs, record, args.report)
    return code


if __name__ == "__main__":
    sys.exit(main())
