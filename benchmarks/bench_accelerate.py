"""`accelerate` on third-party models: values, coverage, CPU time, kernels; and under other people's wrappers.

    python -m benchmarks.bench_accelerate [--only values times kernels wrappers] [--models PATTERN...]
                                          [--rounds 15] [--results FILE]

values    largest relative differences of outputs and gradients in fp32 and fp64, the fast forms run by
          PyTorch's operators; which layers are swapped, which are left and why; calls of own forwards
times     on one CPU thread, nothing asked for: the ratio of the model's time before to that after
kernels   what is launched in Triton's interpreter on tiny shapes, and the differences; TRITON_INTERPRET=1
wrappers  what runs fast, what falls back and what refuses under DDP, FSDP2, LoRA, torch.compile and others

Models whose library cannot be imported are named. Exit code 1 if a value is off, or a ratio below 0.98.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks import accelerate_times, accelerate_values, accelerate_wrapped
from benchmarks.accelerate_models import MODELS
from benchmarks.machine import describe, write_whole
from benchmarks.tables_accelerate import accelerated

SECTIONS = ("values", "times", "kernels", "wrappers")
LIMITS = {"fp32": 2e-4, "fp64": 1e-9}  # relative, of outputs and gradients
_ROUNDS = 15


def measure(sections: tuple[str, ...], names: list[str], rounds: int) -> dict[str, Any]:
    """The result with these sections, JSON-ready.

    Args:
        sections: of `SECTIONS`.
        names:    of `MODELS`.
        rounds:   of timing.
    """
    result = {"benchmark": "accelerate", **describe(torch.device("cpu")), "models": {}, "absent": {}}
    for name in names:
        row: dict[str, Any] = {}
        try:
            if "values" in sections:
                row |= accelerate_values.compare(name)
            if "times" in sections:
                row["times"] = [
                    time
                    for size in ("small", "working")
                    for time in accelerate_times.measure(name, size, rounds)
                ]
            if "kernels" in sections:
                row["kernels"] = accelerate_values.kernels(name)
        except ImportError as error:
            result["absent"][name] = str(error).splitlines()[0]
            continue
        result["models"][name] = row
        print(name, flush=True, file=sys.stderr)
    if "wrappers" in sections:
        result["wrappers"] = accelerate_wrapped.measure()
    result["failed"] = failures(result)
    return result


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
            if each["ratio"] < accelerate_times.LIMIT:
                failed.append(f"{name}, {each['size']}, {each['direction']}: {each['ratio']:.3f}x")
        if "kernels" in row and not max(row["kernels"]["output"], row["kernels"]["gradient"]) <= 1e-3:
            failed.append(f"{name}, kernels: {row['kernels']}")
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections; all that this process can run")
    parser.add_argument("--models", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--results", type=Path, help="write the result into this JSON file")
    args = parser.parse_args(argv)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    possible = ("kernels",) if interpreted else tuple(name for name in SECTIONS if name != "kernels")
    sections = tuple(args.only or possible)
    if impossible := set(sections) - set(possible):
        setting = "without" if interpreted else "with"
        parser.error(f"{', '.join(sorted(impossible))}: only {setting} TRITON_INTERPRET=1")
    names = [name for name in MODELS if any(fnmatch.fnmatchcase(name, each) for each in args.models)]
    if not names:
        parser.error(f"--models {args.models} matches none of {', '.join(MODELS)}")
    warnings.simplefilter("ignore")  # of the libraries
    torch.set_num_threads(1)
    result = measure(sections, names, args.rounds)
    print(accelerated(result))
    if args.results:
        write_whole(args.results, result)
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
