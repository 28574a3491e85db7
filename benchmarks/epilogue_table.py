"""Makes lmim_fast/ops/epilogue_table.py from what `benchmarks/bench_mlp.py` measured.

    python -m benchmarks.epilogue_table OPS_JSON [OPS_JSON ...] [--write]

The files are those of `pytest benchmarks --benchmark-only --results FILE` on CUDA devices. An MLP and a
direction are entered if GELU in the epilogue took 3 % less time than GELU in a separate pass at every batch
and number of tokens that a file has of them. Without `--write` the table is printed.
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

PATH = Path(__file__).parents[1] / "lmim_fast/ops/epilogue_table.py"
MOST = 0.97  # of the time of the separate pass: less is not told from noise
DTYPES = ("bfloat16", "float16")  # what the table is for

Shape = tuple[str, tuple[int, int], int, int]  # direction, compute capability, D, F


def faster(results: Sequence[dict[str, Any]]) -> list[Shape]:
    """Entries of the table, in rising order."""
    ratios: dict[Shape, list[float]] = {}
    for result in results:
        for (shape, *_), times in times_of(result).items():
            # a form that was not timed is no winner
            ratio = times["epilogue"] / times["ours"] if len(times) == 2 else float("inf")
            ratios.setdefault(shape, []).append(ratio)
    return sorted(shape for shape, of_shape in ratios.items() if max(of_shape) <= MOST)


def times_of(result: dict[str, Any]) -> dict[tuple[Shape, int, int], dict[str, float]]:
    """Median microseconds of both forms, by shape, batch and tokens."""
    if "arch" not in result:  # of a CPU
        return {}
    number = int(result["arch"].removeprefix("sm_"))
    times: dict[tuple[Shape, int, int], dict[str, float]] = {}
    for row in result["rows"]:
        compared = row["variant"] in ("ours", "epilogue") and row["dtype"] in DTYPES
        if row["operation"] == "mlp" and compared:
            sizes = row["sizes"]
            shape = row["direction"], (number // 10, number % 10), sizes["width"], sizes["hidden"]
            of_shape = times.setdefault((shape, sizes["batch"], sizes["tokens"]), {})
            of_shape[row["variant"]] = statistics.median(row["microseconds"])
    return times


def table(shapes: Iterable[Shape]) -> str:
    """The set as source."""
    lines = [
        f'    ("{direction}", {capability}, {width}, {hidden}),'
        for direction, capability, width, hidden in shapes
    ]
    return "\n".join(["{", *lines, "}"]) if lines else "set()"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--output", type=Path, default=PATH, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    empty = [str(path) for path, result in zip(args.results, results, strict=True) if not times_of(result)]
    if empty:
        print(f"epilogue_table: no MLP on a CUDA device in {', '.join(empty)}", file=sys.stderr)
        return 1
    source = table(faster(results))
    if args.write:
        text = args.output.read_text(encoding="utf-8")
        written = re.sub(r"(?s)(?<= = )(set\(\)|\{.*\})", lambda _: source, text)
        args.output.write_text(written, encoding="utf-8")
    else:
        print(source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
