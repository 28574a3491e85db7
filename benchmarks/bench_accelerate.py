"""`accelerate` on third-party models: values, coverage, CPU time, kernels; and under other people's wrappers.

    python -m benchmarks.bench_accelerate [--only values times kernels wrappers device] [--models PATTERN...]
                                          [--rounds 15] [--results FILE]

values    largest relative differences of outputs and gradients in fp32 and fp64, the fast forms run by
          PyTorch's operators; which layers are swapped, which are left and why; calls of own forwards
times     on one CPU thread, nothing asked for: the ratio of the model's time before to that after
kernels   what is launched in Triton's interpreter on tiny shapes, and the differences; in its own process
wrappers  what runs fast, what falls back and what refuses under DDP, FSDP2, LoRA, torch.compile and others
device    on a CUDA device, bf16: milliseconds before, after, compiled, and both; only if it is named

Models whose library cannot be imported are named. Exit code 1 if a value is off, or a ratio below 0.98.
"""

from __future__ import annotations

import argparse
import fnmatch
import glob
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.accelerated import device, times, values, wrapped
from benchmarks.accelerated.models import MODELS
from benchmarks.machine import describe, write_whole
from benchmarks.tables_accelerate import accelerated

SECTIONS = ("values", "times", "kernels", "wrappers", "device")
LIMITS = {"fp32": 2e-4, "fp64": 1e-9}  # relative, of outputs and gradients
_ROUNDS = 15


def measure(sections: tuple[str, ...], names: list[str], rounds: int) -> dict[str, Any]:
    """The result with these sections, JSON-ready.

    Args:
        sections: of `SECTIONS`.
        names:    of `MODELS`.
        rounds:   of timing.
    """
    result = {
        "benchmark": "accelerate",
        **describe(torch.device("cuda" if "device" in sections else "cpu")),
        "models": {},
        "absent": {},
    }
    for name in names:
        row: dict[str, Any] = {}
        try:
            if "values" in sections:
                row |= values.compare(name)
            if "times" in sections:
                sizes = ("small", "working")
                row["times"] = [time for size in sizes for time in times.measure(name, size, rounds)]
            if "device" in sections:
                row["device"] = device.measure(name, rounds)
            if "kernels" in sections and interpreted():
                row["kernels"] = values.kernels(name)
        except ImportError as error:
            result["absent"][name] = str(error).splitlines()[0]
            continue
        result["models"][name] = row
        print(name, flush=True, file=sys.stderr)
    if "kernels" in sections and not interpreted():
        for name, row in _kernels(list(result["models"])).items():
            result["models"][name] |= row
    if "wrappers" in sections:
        result["wrappers"] = wrapped.measure()
    result["failed"] = failures(result)
    return result


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels(names: list[str]) -> dict[str, Any]:
    """Rows of the section "kernels", from a process with Triton's interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.json"
        command = [sys.executable, "-m", "benchmarks.bench_accelerate", "--only", "kernels", "--models"]
        subprocess.run(
            [*command, *map(glob.escape, names), "--results", str(path)],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            stdout=subprocess.DEVNULL,
        )
        rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["models"]
    return rows


def failures(result: dict[str, Any]) -> list[str]:
    """What is off, in words."""
    failed = []
    for name, row in result["models"].items():
        for each in row.get("differences", ()):
            where = f"{name}, {each['dtype']}, {each['mode']}"
            if "error" in each:
                continue
            if not max(each["output"], each["gradient"]) <= LIMITS[each["dtype"]]:
                failed.append(f"{where}: output {each['output']:.1e}, {each['worst']} {each['gradient']:.1e}")
            if not each["undone"]:
                failed.append(f"{where}: undo leaves another output")
        for each in row.get("times", ()):
            if each["ratio"] < times.LIMIT:
                failed.append(f"{name}, {each['size']}, {each['direction']}: {each['ratio']:.3f}x")
        if "kernels" in row and not max(row["kernels"]["output"], row["kernels"]["gradient"]) <= 1e-3:
            failed.append(f"{name}, kernels: {row['kernels']}")
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS[:-1]), help="sections")
    parser.add_argument("--models", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--results", type=Path, help="write the result into this JSON file")
    args = parser.parse_args(argv)
    if "device" in args.only and not torch.cuda.is_available():
        parser.error("--only device needs a CUDA device")
    if interpreted() and "times" in args.only:
        parser.error("TRITON_INTERPRET=1 is set: the times would be the interpreter's")
    names = [name for name in MODELS if any(fnmatch.fnmatchcase(name, each) for each in args.models)]
    if not names:
        parser.error(f"--models {args.models} matches none of {', '.join(MODELS)}")
    warnings.simplefilter("ignore")  # of the libraries
    torch.set_num_threads(1)
    result = measure(tuple(args.only), names, args.rounds)
    print(accelerated(result))
    if args.results:
        write_whole(args.results, result)
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
