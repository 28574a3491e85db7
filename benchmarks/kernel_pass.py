"""One small pass of every kernel, forward and backward, held against plain PyTorch: for tools that watch it.

    python -m benchmarks.kernel_pass [--batch 16 ...] [--only REGEX] [--results FILE]
    python -m benchmarks.kernel_pass --planted memcheck|racecheck

A line for each operation, the leading ones first. Exit code 1 if one is wrong or a kernel was not launched.
`--planted` runs a kernel with a fault instead. `benchmarks/sanitize.py` runs it under checkers.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness, operations
from benchmarks.machine import Record, dry_run
from benchmarks.planted_faults import FAULTS, launch_faulty

DONE = "kernel pass: all well"  # what a complete run prints last
PLANTED = "kernel pass: the fault was launched"


def run(batches: Sequence[int], only: str = "", record: Record | None = None) -> bool:
    """True if every operation is right and every kernel was launched; says what was not, and files it."""
    record = record or Record(None, "kernel_pass", harness.DEVICE)
    chosen = [item for batch in batches for item in operations.every(batch) if re.search(only, str(item))]
    chosen.sort(key=lambda operation: not operation.leading)
    todo = [(operation, variant) for operation in chosen for variant in operation.ours]
    launched, right = set[str](), 0
    if not todo:
        record.fail(f"no operation matches {only!r}")
    for number, (operation, variant) in enumerate(todo, 1):
        about = dict(operation=str(operation), variant=variant)
        record.result["running"] = about  # it may be the last word
        record.write()
        try:
            names = harness.verify(operation, variant)
            verdict = f"right, {', '.join(names) or 'no kernel'}"
        except harness.Unavailable as error:
            names, verdict = [], f"not here: {error}"
        except AssertionError as error:
            names, verdict = [], f"WRONG: {error}"
        except torch.AcceleratorError as error:  # whatever followed would fail
            record.fail(f"{type(error).__name__}: {error}", **about)
            raise
        except Exception as error:  # Triton has no one class for what its compiler and launcher raise
            names, verdict = [], f"FAILED: {type(error).__name__}: {error}"
        launched.update(names)
        if verdict.startswith(("WRONG", "FAILED")):
            record.fail(verdict, **about)
        right += verdict.startswith("right")
        record.result["headline"] = f"{right} of {len(todo)} operations right"
        record.add(about | dict(verdict=verdict))
        _say(f"{number}/{len(todo)} {operation} {variant}: {verdict}")
    record.result.pop("running", None)
    missing = sorted(operations.shipped_kernels() - launched)
    if missing and not only:
        record.fail(f"not launched: {', '.join(missing)}")
    _say(f"{len(launched)} kernels launched" + (f", not {', '.join(missing)}" if missing else ""))
    return record.end() == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[16], help="rows are a multiple of it: of 16, as in training"
    )
    parser.add_argument("--only", default="", help="a regular expression for the names of operations")
    parser.add_argument("--planted", choices=list(FAULTS), help="what has to find the fault")
    parser.add_argument("--results", type=Path, help="JSON file, written after each operation")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not dry_run():
        print(f"kernel pass: torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 1
    if args.planted:
        _launch_planted(args.planted)
    well = run(args.batch, args.only, Record(args.results, "kernel_pass", harness.DEVICE))
    _say(DONE if well else "kernel pass: RED")
    return int(not well)


def _launch_planted(tool: str) -> None:
    """Launch the fault and leave: it can take the CUDA context with it, and nothing of that is an error."""
    launch_faulty(tool, harness.DEVICE)
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        _say(str(error).splitlines()[0])
    _say(PLANTED)
    os._exit(0)


def _say(line: str) -> None:
    """A line in one piece: a checker writes into the same stream."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
