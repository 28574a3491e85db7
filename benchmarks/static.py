"""Compiles every shipped kernel configuration without a GPU and fails on what a GPU would suffer from.

    python -m benchmarks.static --arch sm_90 [--arch sm_100 | --arch all] [--only REGEX] [--beside DIR ...]
                                [--json] [--results DIR]

That is a spilled register, a limit exceeded, a product without tensor cores, and an operand that Hopper may
read past the end of shared memory (`benchmarks/wgmma.py`). The configurations are those that the launch
functions choose on real sizes (`benchmarks/static_cases/`). `--beside` names folders with other versions of
Triton (`pip install --no-deps --target DIR triton==VERSION`), which compile them too. Exit code 1 when one
fails; the last line of each Triton sums up.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, write_whole
from benchmarks.static_build import ARCHES, Report, Selection, compile_all

_RESOURCES = ("registers", "spilled", "shared", "threads")


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
        f"static: Triton {triton_version()}, {len(reports)} configurations of {kernels} kernels for "
        f"{', '.join(arches)}: {f'{failed} FAILED' if failed else 'all pass'}, at most "
        f"{max((report.registers for report in reports), default=0)} registers and "
        f"{max((report.shared for report in reports), default=0)} bytes of shared memory"
    )


def triton_version() -> str:
    return importlib.metadata.version("triton")


def line(report: Report) -> str:
    """A report for the terminal; the configuration comes last."""
    mma = " ".join(f"{count} {name}" for name, count in report.mma.items())
    return " | ".join(
        [
            report.kernel.rpartition(".")[2].replace(":", "."),
            report.cases[0] + (f" and {len(report.cases) - 1} more" if report.cases[1:] else ""),
            f"{report.registers} registers",
            f"{report.spilled} spilled",
            f"{report.shared} bytes",
            f"{report.blocks_per_multiprocessor} x {report.threads} threads/SM",
            mma or ("no MMA" if report.products else "-"),
            report.configuration,
        ]
    )


def of_kernels(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a kernel: the most of each resource over its configurations, the least and most occupancy."""
    rows = []
    for kernel, group in groupby(sorted(reports, key=itemgetter("kernel")), itemgetter("kernel")):
        found = list(group)
        warps = [report["warps_per_multiprocessor"] for report in found]
        row: dict[str, Any] = dict(kernel=kernel.removeprefix("lmim_fast.kernels.").replace(":", "."))
        row |= dict(configurations=len(found), failing=sum(bool(report["failures"]) for report in found))
        row |= {name: max(report[name] for report in found) for name in _RESOURCES}
        row |= dict(warps_per_multiprocessor=[min(warps), max(warps)])
        rows.append(row | dict(mma=sorted({name for report in found for name in report["mma"]})))
    return rows


def write(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """static_<arch>.json for each arch: a summary of each Triton."""
    folder.mkdir(parents=True, exist_ok=True)
    for arch, group in groupby(sorted(results, key=itemgetter("device")), itemgetter("device")):
        of_arch = list(group)
        compilers = {result["versions"]["triton"]: of_kernels(result["rows"]) for result in of_arch}
        whole = {name: value for name, value in of_arch[0].items() if name not in ("rows", "versions")}
        write_whole(folder / f"static_{arch.replace('_', '')}.json", whole | dict(compilers=compilers))


def beside(folder: Path, argv: Sequence[str]) -> tuple[list[dict[str, Any]], bool]:
    """Results of the Triton in `folder`, and whether something failed.

    Raises:
        SystemExit: there is no Triton, or the process fails otherwise.
    """
    if not (folder / "triton").is_dir():
        raise SystemExit(f"static: no Triton in {folder}")
    paths = [str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "benchmarks.static", *argv, "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"static: the Triton in {folder} ended with exit code {done.returncode}")
    return json.loads(done.stdout), done.returncode == 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", action="append", choices=[*ARCHES, "all"], help="default: sm_90")
    parser.add_argument("--cases", default="benchmarks.static_cases", help="module with the launches")
    parser.add_argument("--only", default="", help="a regular expression for the names of the cases")
    parser.add_argument("--jobs", type=int, default=2, help="compiling processes")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="folder with another Triton")
    parser.add_argument("--json", action="store_true", help="print all reports: a list, an arch each")
    parser.add_argument("--results", type=Path, help="write static_<arch>.json into this folder")
    args = parser.parse_args(argv)
    without_interpreter()
    chosen = args.arch or ["sm_90"]
    arches = list(ARCHES) if "all" in chosen else list(dict.fromkeys(chosen))
    machine = describe(torch.device("cpu"))  # once: files that are written below change the checkout
    by_arch: dict[str, list[Report]] = {arch: [] for arch in arches}
    for arch, report in compile_all(Selection(args.cases, args.only), arches, args.jobs):
        by_arch[arch].append(report)
        if not args.json:
            print(arch, line(report), sep=" | ", flush=True)
        for failure in report.failures:
            where = f"Triton {triton_version()}, {arch} {report.kernel} for {report.cases[0]}"
            print(f"FAILED {where}: {failure} ({report.configuration})", file=sys.stderr)
    reports = [report for rows in by_arch.values() for report in rows]
    if not reports:
        raise SystemExit(f"static: no case matches {args.only!r}")
    failed = any(report.failures for report in reports)
    print(summary(reports, arches), file=sys.stderr if args.json else sys.stdout, flush=True)
    results = [
        dict(benchmark="static", **machine | {"device": arch}, rows=[report.as_json() for report in rows])
        for arch, rows in by_arch.items()
    ]
    for folder in args.beside:
        given = [f"--arch={arch}" for arch in arches]
        given += [f"--cases={args.cases}", f"--only={args.only}", f"--jobs={args.jobs}"]
        others, red = beside(folder, given)
        results, failed = [*results, *others], failed or red
    if args.json:
        print(json.dumps(results))
    if args.results:
        write(args.results, results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
