"""Fails where one of our operations got more than 10 % slower than in the last saved run on this device.

    python -m benchmarks.compare [--save] [pytest options]

The saved run is .benchmarks/<device>/last.json: the first one, until `--save` runs without comparing and
replaces it. A run that passes does not, so that small losses add up until one fails. The comparison is
pytest-benchmark's, by the median of each operation.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
STORAGE = ROOT / ".benchmarks"
LIMIT = "median:10%"


def device_name() -> str:
    """Of the GPU, or of the CPU with its cores: what runs are kept apart by."""
    if torch.cuda.is_available():
        return _slug(torch.cuda.get_device_name())
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return _slug(f"{model[1] if model else 'cpu'} {torch.get_num_threads()} threads")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def main(arguments: list[str] | None = None) -> int:
    options = sys.argv[1:] if arguments is None else arguments
    folder = STORAGE / device_name()
    last, new = folder / "last.json", folder / "new.json"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-k", "ours", "-q"]
    command += ["--benchmark-columns=median,min,max,rounds", f"--benchmark-json={new}"]
    comparing = last.exists() and "--save" not in options
    first = not last.exists()
    options = [option for option in options if option != "--save"]
    if comparing:
        command += [f"--benchmark-compare={last}", f"--benchmark-compare-fail={LIMIT}"]
    elif first:
        print(f"No run on this device yet: this one will be saved as {last.relative_to(ROOT)}", flush=True)
    code = subprocess.run([*command, *options], cwd=ROOT, check=False).returncode
    if code:
        print(f"The run failed. It is in {new.relative_to(ROOT)}", file=sys.stderr)
        return 1
    if comparing:
        print(f"Compared with {last.relative_to(ROOT)}, which stays; --save replaces it")
        return 0
    new.replace(last)
    print(f"Saved as {last.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
