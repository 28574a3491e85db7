"""Chosen operations and variants, timed one after the other without pytest: each row is filed at once.

    python -m benchmarks.ops_run --results FILE --only REGEX [REGEX ...] [--batch 512] [--variants NAME ...]

Operations are those of `benchmarks/bench_*.py`, in the order of the expressions. Exit code 1 if one of ours
is wrong or fails; what this machine cannot run is filed under `skipped` with the reason. Nothing is compiled
by torch.compile unless a variant asks for it.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, harness, operations
from benchmarks.harness import Operation
from benchmarks.machine import Record

VARIANTS = (
    "ours",
    "one launch",
    "two launches",
    "eager",
    "fp32 out",
    "cudnn",
    "flash",
    "flash_attn",
    "sdpa",
)


def chosen(batch: int, only: Sequence[str]) -> Iterator[Operation]:
    """Operations whose names match an expression, those of the first expression first."""
    known = list(operations.every(batch))
    seen: set[str] = set()
    for pattern in only:
        for operation in known:
            if re.search(pattern, str(operation)) and str(operation) not in seen:
                seen.add(str(operation))
                yield operation


def run(record: Record, todo: Sequence[Operation], variants: Sequence[str]) -> None:
    """Time them all.

    Raises:
        torch.AcceleratorError: the device is beyond use; it is filed.
    """
    for operation in todo:
        copies = harness.copies_of(operation)
        offered = [name for name in variants if name in ("eager", *operation.ours, *operation.others)]
        for direction in operation.directions:
            for variant in offered:
                about = dict(operation=str(operation), direction=direction, variant=variant)
                try:
                    row = harness.prepared(operation, direction, variant, copies).measured()
                except harness.Unavailable as error:
                    record.result["skipped"].append(about | dict(reason=str(error)))
                    continue
                except Exception as error:  # Triton has no one class for what it raises
                    record.fail(f"{type(error).__name__}: {str(error).strip()[:300]}", **about)
                    if isinstance(error, torch.AcceleratorError):
                        raise
                    continue
                record.result["headline"] = headline([*record.result["rows"], row])
                record.add(row)
                print(
                    f"{operation} {direction} {variant}: {row['percent_of_floor']:.0f}% of the floor",
                    flush=True,
                )
        del copies
        gc.collect()
        torch.cuda.empty_cache()  # of graphs; does nothing on a CPU


def headline(rows: Sequence[dict[str, Any]]) -> str:
    """Shares of the floor: of ours, and of the library's products."""
    shown = [
        f"{row['operation']} {row['sizes']['model']} N{row['sizes']['tokens']} {row['percent_of_floor']:.0f}%"
        for row in rows
        if row["variant"] == "ours" and row["direction"] != "forward"
    ]
    products = [row["percent_of_floor"] for row in rows if row["operation"].startswith("linear")]
    text = f"{len(rows)} rows"
    if products:
        text += f"; linears {min(products):.0f}% to {max(products):.0f}% of the floor"
    return text + (f"; ours, forward+backward: {', '.join(shown)}" if shown else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="regular expressions for names of operations")
    parser.add_argument("--batch", type=int, default=harness.BATCHES[0])
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--results", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    record = Record(args.results, "ops", harness.DEVICE, skipped=[])
    record.result["ceilings"] = vars(ceilings.measure(harness.DEVICE, harness.DTYPE))
    with suppress(torch.AcceleratorError):  # it is filed
        run(record, list(chosen(args.batch, args.only)), args.variants)
    if not record.result["rows"]:
        record.fail("no operation was timed")
    return record.end()


if __name__ == "__main__":
    sys.exit(main())
