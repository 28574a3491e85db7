"""Makes lmim_fast/ops/attention_table.py from what `benchmarks/tune.py` measured of attention backends.

    python -m benchmarks.attention_table TUNE_JSON [TUNE_JSON ...] [--write]

A backend of PyTorch is entered for an op and a shape that are in every file, so for every batch, where it
took 3 % less time than the kernel in all of them. Without `--write` the table is printed.
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

PATH = Path(__file__).parents[1] / "lmim_fast/ops/attention_table.py"
ENTERED = ("cudnn", "sdpa")  # those that every PyTorch has
MOST = 0.97  # of the kernel's time: less is not told from noise

Shape = tuple[str, tuple[int, int], int, int, int]  # op, compute capability, width of a head, queries, keys


def faster(results: Sequence[dict[str, Any]]) -> dict[Shape, str]:
    """Shapes and backends, by rising shape; of several backends the one that is best where it is worst."""
    ratios: dict[Shape, dict[str, list[float]]] = {}
    for result in results:
        for shape, times in _by_shape(result).items():
            for name in ENTERED:
                ratio = times[name] / times["triton"] if name in times else float("inf")
                ratios.setdefault(shape, {}).setdefault(name, []).append(ratio)
    found = {}
    for shape, of_backends in sorted(ratios.items()):
        best = min(of_backends, key=lambda name: max(of_backends[name]))
        if max(of_backends[best]) <= MOST and len(of_backends[best]) == len(results):
            found[shape] = best
    return found


def _by_shape(result: dict[str, Any]) -> dict[Shape, dict[str, float]]:
    """Median microseconds of each backend, where the kernel ran."""
    number = int(result["arch"].removeprefix("sm_"))
    times: dict[Shape, dict[str, float]] = {}
    for row in result["rows"]:
        if row["study"] == BACKEND_STUDY and "microseconds" in row:
            sizes = row["sizes"]
            dim = sizes["width"] // sizes["heads"]
            capability = number // 10, number % 10
            shape = row["operation"], capability, dim, sizes["tokens"], sizes["memory"]
            of_shape = times.setdefault(shape, {})
            median = statistics.median(row["microseconds"])
            of_shape[row["candidate"].removeprefix("backend=")] = median
    return {shape: of_shape for shape, of_shape in times.items() if "triton" in of_shape}


def table(found: Iterable[tuple[Shape, str]]) -> str:
    """The dictionary as source."""
    lines = [
        f'    ("{op}", {capability}, {dim}, {queries}, {keys}): "{name}",'
        for (op, capability, dim, queries, keys), name in found
    ]
    return "\n".join(["{", *lines, "}"]) if lines else "{}"


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
    source = table(faster(results).items())
    if args.write:
        text = args.output.read_text(encoding="utf-8")
        args.output.write_text(re.sub(r"(?s)(?<= = )\{.*\}", lambda _: source, text), encoding="utf-8")
    else:
        print(source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
