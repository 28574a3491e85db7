"""Compiles every shipped kernel configuration without a GPU and fails on spills, over-limits and lost MMA.

    python -m benchmarks.static --arch sm_90 [--arch sm_100 | --arch all] [--only REGEX]
                                [--json] [--markdown] [--results DIR]

The configurations are those that the launch functions choose on real sizes (`benchmarks/static_cases/`).
Exit code 1 when one fails; the last line sums up.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, write_whole
from benchmarks.static_build import ARCHES, Report, Selection, compile_all


def without_interpreter() -> None:
    """Make Triton compile; an interpreter that was chosen before Triton's import cannot be undone."""
    interpreted = os.environ.pop("TRITON_INTERPRET", None) == "1"
    if interpreted and "triton" in sys.modules:
        raise SystemExit("static: Triton was imported with TRITON_INTERPRET; start a process without it")


def summary(reports: Sequence[Report], arches: Sequence[str]) -> str:
    """One line: how many configurations of how many kernels, and how many fail."""
    failed = sum(bool(report.failures) for report in reports)
    kernels = len({report.kernel for report in reports})
    return (
        f"static: {len(reports)} configurations of {kernels} kernels for {', '.join(arches)}: "
        f"{f'{failed} FAILED' if failed else 'all pass'}, at most "
        f"{max((report.registers for report in reports), default=0)} registers and "
        f"{max((report.shared for report in reports), default=0)} bytes of shared memory"
    )


COLUMNS = ("kernel", "for", "registers", "spilled", "shared", "threads", "blocks/SM", "warps/SM", "MMA")


def cells(report: dict[str, Any]) -> list[str]:
    """A report's line of the table; the configuration comes last."""
    mma = " ".join(f"{count} {name}" for name, count in report["mma"].items())
    numbers = ("registers", "spilled", "shared", "threads")
    occupancy = ("blocks_per_multiprocessor", "warps_per_multiprocessor")
    return [
        report["kernel"].rpartition(".")[2].replace(":", "."),
        report["cases"][0] + (f" and {len(report['cases']) - 1} more" if report["cases"][1:] else ""),
        *(str(report[name]) for name in (*numbers, *occupancy)),
        mma or ("none" if report["products"] else "-"),
        report["configuration"],
    ]


def markdown(reports: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * 2 + ["--:"] * 6 + ["---"] * 2
    lines = [[*COLUMNS, "configuration"], rule, *(cells(report) for report in reports)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def result(arch: str, reports: Sequence[Report], machine: dict[str, Any]) -> dict[str, Any]:
    """The JSON form; the device is the arch that was compiled for."""
    rows = [report.as_json() for report in reports]
    return dict(benchmark="static", **machine | {"device": arch}, rows=rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", action="append", choices=[*ARCHES, "all"], help="default: sm_90")
    parser.add_argument("--cases", default="benchmarks.static_cases", help="module with the launches")
    parser.add_argument("--only", default="", help="a regular expression for the names of the cases")
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes")
    parser.add_argument("--json", action="store_true", help="print a list of results, an arch each")
    parser.add_argument("--markdown", action="store_true", help="print a table an arch")
    parser.add_argument("--results", type=Path, help="write static_<arch>.json into this folder")
    args = parser.parse_args(argv)
    without_interpreter()
    chosen = args.arch or ["sm_90"]
    arches = list(ARCHES) if "all" in chosen else list(dict.fromkeys(chosen))
    by_arch: dict[str, list[Report]] = {arch: [] for arch in arches}
    quiet = args.json or args.markdown
    for arch, report in compile_all(Selection(args.cases, args.only), arches, args.jobs):
        by_arch[arch].append(report)
        if not quiet:
            print(arch, " | ".join(cells(report.as_json())), flush=True)
        for failure in report.failures:
            where = f"{arch} {report.kernel} for {report.cases[0]}"
            print(f"FAILED {where}: {failure} ({report.configuration})", file=sys.stderr)
    machine = describe(torch.device("cpu"))  # once: files that are written below change the checkout
    if args.json:
        print(json.dumps([result(arch, reports, machine) for arch, reports in by_arch.items()]))
    if args.markdown:
        print("\n\n".join(f"## {a}\n\n{markdown([r.as_json() for r in rs])}" for a, rs in by_arch.items()))
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
    for arch, reports in by_arch.items() if args.results else ():
        path = args.results / f"static_{arch.replace('_', '')}.json"
        write_whole(path, result(arch, reports, machine))
    reports = [report for rows in by_arch.values() for report in rows]
    print(summary(reports, arches), file=sys.stderr if args.json else sys.stdout)
    return any(report.failures for report in reports)


if __name__ == "__main__":
    sys.exit(main())
