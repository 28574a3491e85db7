"""What limits each kernel, by Nsight Compute's hardware counters: where to look when an op misses its floor.

    python -m benchmarks.counters [--only REGEX] [--batch 512] [--json]

One forward and backward pass of every leading operation, or of those whose names match. A line a launch: its
time under the profiler, the share of peak memory bandwidth and of peak issue, the busiest pipe, active warps,
registers, and what warps wait for most. The clocks are left as they are. Exit code 3 where there is no `ncu`
or no CUDA device.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, operations
from benchmarks.operation import launches

ROOT = Path(__file__).parents[1]
ABSENT = 3
_INSTALLED = Path("/opt/nvidia/nsight-compute")
_SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "ComputeWorkloadAnalysis")
_COLUMNS = {
    "nanoseconds": "gpu__time_duration.sum",
    "memory": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "issue": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
_PIPE = re.compile(r"sm__inst_executed_pipe_(\w+?)(_realtime)?\.avg\.pct_of_peak_sustained_active$")
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio$")
_NOT_WAITING = ("selected",)  # warps that issue
_INPUTS = ""  # stands for the operation where inputs are made


def find() -> str | None:
    """ncu: on PATH, in the CUDA toolkit, or where Nsight Compute is installed by itself, the newest."""
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    folders += sorted(map(str, _INSTALLED.glob("*")), reverse=True)
    return shutil.which("ncu", path=os.pathsep.join(folders))


def command(ncu: str, log: Path, launched: Path, only: str, batch: int) -> list[str]:
    """ncu over a worker; its report goes to `log`, the names of the launches to `launched`."""
    names = "|".join(operations.symbols())
    options = ["--clock-control", "none", "--target-processes", "application-only"]
    options += ["--kernel-name-base", "function", "--kernel-name", f"regex:^({names})$"]
    for section in _SECTIONS:
        options += ["--section", section]
    options += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    worker = [sys.executable, "-m", "benchmarks.counters", "--worker", str(launched)]
    return [ncu, *options, *worker, "--only", only, "--batch", str(batch)]


def work(launched: Path, only: str, batch: int) -> None:
    """Run the operations, and write which kernels each has launched, in order, as JSON."""
    order: list[tuple[str, str]] = []
    with launches() as names:
        for operation in operations.every(batch):
            chosen = re.search(only, str(operation)) if only else operation.leading
            if not chosen or not operation.ours:
                continue
            inputs, gradients = harness.copies_of(operation)[0]
            order += [(_INPUTS, name) for name in names[len(order) :]]
            outputs = operation.ours["ours"](*inputs)
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            if wanted:
                outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
                torch.autograd.grad(outputs, wanted, gradients)
            order += [(str(operation), name) for name in names[len(order) :]]
    if harness.DEVICE.type == "cuda":
        torch.cuda.synchronize()
    launched.write_text(json.dumps(order), encoding="utf-8")


def rows(report: Iterable[str], launched: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """A row for each launch of an operation, from ncu's raw page.

    Raises:
        ValueError: the report is none, or has other launches than were made.
    """
    lines = itertools.dropwhile(lambda line: not line.startswith('"ID"'), report)
    found = list(csv.DictReader(lines))[1:]  # the first one has the units
    kernels = [row["Kernel Name"].partition("(")[0] for row in found]
    if not found or kernels != [name.rpartition(".")[2] for _, name in launched]:
        raise ValueError(f"ncu reports the launches {kernels}, made were {[name for _, name in launched]}")
    return [
        dict(operation=operation, kernel=name, **_limits(row))
        for row, (operation, name) in zip(found, launched, strict=True)
        if operation != _INPUTS
    ]


def _limits(row: dict[str, str]) -> dict[str, Any]:
    values = {name: _number(text) for name, text in row.items() if text is not None}
    pipes = {match[1]: values[name] for name in values if (match := _PIPE.match(name))}
    stalls = {match[1]: values[name] for name in values if (match := _STALL.match(name))}
    told: dict[str, Any] = {name: values.get(column) for name, column in _COLUMNS.items()}
    known = {name: value for name, value in pipes.items() if value is not None}
    told["pipe"] = max(known.items(), key=lambda item: item[1], default=None)
    waits = [(name, value) for name, value in stalls.items() if value and name not in _NOT_WAITING]
    told["waits"] = sorted(waits, key=lambda item: -item[1])[:3]
    return told


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def line(row: dict[str, Any]) -> str:
    """For a terminal."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}%"

    time = row["nanoseconds"]
    pipe = "-" if row["pipe"] is None else f"{row['pipe'][0]} {percent(row['pipe'][1])}"
    waits = ", ".join(f"{name} {value:.1f}" for name, value in row["waits"])
    registers = "-" if row["registers"] is None else f"{row['registers']:.0f}"
    return (
        f"{row['operation']} | {row['kernel']} | {'-' if time is None else f'{time / 1e3:.1f}'} us | "
        f"memory {percent(row['memory'])} | issue {percent(row['issue'])} | pipe {pipe} | "
        f"warps {percent(row['warps'])} | {registers} registers | waits for {waits or '-'}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a regular expression for the names of operations")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    ncu = find()
    if ncu is None or not torch.cuda.is_available():
        missing = "ncu (Nsight Compute)" if ncu is None else "CUDA device"
        print(f"counters: there is no {missing}", file=sys.stderr)
        return ABSENT
    if args.worker:
        work(args.worker, args.only, args.batch)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        log, launched = Path(folder) / "ncu.csv", Path(folder) / "launched.json"
        code = subprocess.run(
            command(ncu, log, launched, args.only, args.batch), cwd=ROOT, stdout=sys.stderr, check=False
        ).returncode
        report = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        if code or not launched.exists():
            print("\n".join([*report[-20:], f"counters: ncu ended with {code}"]), file=sys.stderr)
            return 1
        found = rows(report, json.loads(launched.read_text(encoding="utf-8")))
    print(json.dumps(found, indent=1) if args.json else "\n".join(map(line, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
