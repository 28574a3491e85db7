"""Enters into lmim_fast/ops/routes.py what `benchmarks/tune.py` measured of attention backends.

    python -m benchmarks.attention_table TUNE_JSON [TUNE_JSON ...] [--write]

A backend of PyTorch gets a forward rule for an op and a shape that are in every file, so for every batch, if
it took 3 % less time than the kernel in all of them. Rules for other directions stay. Without `--write` the
table is printed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tune_studies import BACKEND_STUDY
from lmim_fast.ops import routes
from lmim_fast.ops.routes import Route, Size

PATH = Path(__file__).parents[1] / "lmim_fast/ops/routes.py"
ENTERED = ("cudnn", "sdpa")  # those that every PyTorch has
_TABLE = re.compile(r"^(TABLE: [^=]*= )\((?:\)|.*?^\))", re.MULTILINE | re.DOTALL)
MOST = 0.97  # of the kernel's time: less is not told from noise

Shape = tuple[str, Size]  # op, and what a rule depends on


def faster(results: Sequence[dict[str, Any]]) -> list[Route]:
    """Forward rules, by rising shape; of several backends the one that is best in its worst file."""
    ratios: dict[Shape, dict[str, list[float]]] = {}
    for result in results:
        for shape, times in _by_shape(result).items():
            for name in ENTERED:
                ratio = times[name] / times["triton"] if name in times else float("inf")
                ratios.setdefault(shape, {}).setdefault(name, []).append(ratio)
    found = []
    for (op, size), of_backends in sorted(ratios.items()):
        best = min(of_backends, key=lambda name: max(of_backends[name]))
        if max(of_backends[best]) <= MOST and len(of_backends[best]) == len(results):
            found.append(Route(op, "forward", best, *size))
    return found


def _by_shape(result: dict[str, Any]) -> dict[Shape, dict[str, float]]:
    """Median microseconds of each backend, where the kernel ran."""
    number = int(result["arch"].removeprefix("sm_"))
    times: dict[Shape, dict[str, float]] = {}
    for row in result["rows"]:
        if row["study"] == BACKEND_STUDY and "microseconds" in row:
            sizes = row["sizes"]
            width = sizes["width"] // sizes["heads"]
            size = Size((number // 10, number % 10), width, sizes["tokens"], sizes["memory"])
            of_shape = times.setdefault((row["operation"], size), {})
            median = statistics.median(row["microseconds"])
            of_shape[row["candidate"].removeprefix("backend=")] = median
    return {shape: of_shape for shape, of_shape in times.items() if "triton" in of_shape}


def table(rules: Iterable[Route]) -> str:
    """The rules as the source of a tuple."""
    lines = []
    for rule in rules:
        names = ", ".join(f'"{name}"' for name in (rule.op, rule.direction, rule.backend))
        size = f"{rule.capability}, {rule.width}, {rule.queries}, {rule.keys}"
        lines.append(f"    Route({names}, {size}{', deterministic=True' if rule.deterministic else ''}),")
    return "\n".join(["(", *lines, ")"]) if lines else "()"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--output", type=Path, default=PATH, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    if not any(_by_shape(result) for result in results):
        print(f"attention_table: no study {BACKEND_STUDY!r} in these files", file=sys.stderr)
        return 1
    kept = [rule for rule in routes.TABLE if rule.direction != "forward"]
    source = table([*kept, *faster(results)])
    if args.write:
        text = args.output.read_text(encoding="utf-8")
        args.output.write_text(re.sub(_TABLE, lambda match: match[1] + source, text), encoding="utf-8")
    else:
        print(source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
