"""What a result was measured on: device, clocks, versions, commit; and its file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # else when it is needed: who writes results may do without
    import torch

COMMIT = "LMIM_FAST_COMMIT"  # environment: the commit of a copy that is no checkout
DRY_RUN = "LMIM_FAST_DRY_RUN"  # environment: CPU stand-ins on tiny shapes, whose results are marked
ABSENT = 3  # exit code: this machine lacks what the program needs

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "opencv-python-headless",
)


def dry_run() -> bool:
    """Whether programs are only rehearsed, on a CPU."""
    return os.environ.get(DRY_RUN) == "1"


def describe(device: torch.device) -> dict[str, Any]:
    """JSON-ready: device, its clocks, cores, threads of torch, versions, commit (None if it is not known)."""
    import torch

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = device.type == "cuda"
    machine = {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": _commit(),
    }
    if cuda:
        machine["clocks"] = clocks()
    return machine | ({"dry_run": True} if dry_run() else {})


def clocks() -> dict[str, float] | None:
    """Clocks of the CUDA device in MHz (the SMs', their maximum, the memory's), watts, degrees Celsius.

    None if nvidia-smi does not tell them.
    """
    import torch

    names = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")
    try:
        device = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        command = [
            "nvidia-smi",
            "-i",
            device,
            f"--query-gpu={','.join(names)}",
            "--format=csv,noheader,nounits",
        ]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        return dict(zip(names, map(float, output.strip().split(",")), strict=True))
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return None


class Record:
    """A result that is written after each figure: what is measured stays, however the run ends.

    `result` is JSON-ready and holds the machine, `rows`, `failed` and a `verdict`: "unfinished" until `end`,
    "red" from the first failure on, or "green". A `headline` in it is what a summary shows.

    Args:
        path:      of the JSON file; None: nothing is written.
        benchmark: kind of the result, by which `benchmarks/tables.py` renders it.
        device:    that it is measured on.
        fields:    more of the result.
    """

    def __init__(self, path: Path | None, benchmark: str, device: torch.device, **fields: Any) -> None:
        self._path = path
        self.result: dict[str, Any] = {"benchmark": benchmark, **describe(device), **fields}
        self.result |= {"verdict": "unfinished", "rows": [], "failed": []}
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        """File a row."""
        self.result["rows"].append(row)
        self.write()

    def fail(self, error: str, **about: Any) -> None:
        """File a failure; `about` says of what."""
        self.result["failed"].append(about | {"error": error})
        self.result["verdict"] = "red"
        self.write()

    def end(self) -> int:
        """All is measured; the exit code: 1 if something failed."""
        self.result["verdict"] = "red" if self.result["failed"] else "green"
        self.write()
        return int(bool(self.result["failed"]))

    def write(self) -> None:
        """Write the result as it is now."""
        if self._path is not None:
            write_whole(self._path, self.result)


def write_whole(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, so that the file is the last one or this one, however the process ends."""
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)


def _commit() -> str | None:
    if named := os.environ.get(COMMIT):
        return named
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
