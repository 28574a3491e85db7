"""Tries launch configurations of the kernels: what the compiler makes of them, and what they take on a GPU.

    python -m benchmarks.tune [--only REGEX] [--batch 512] [--seconds N] [--results FILE] [--jobs N]
    python -m benchmarks.tune --static [--arch sm_90]                                 # needs no GPU

The studies are in `benchmarks/tune_studies.py`. All configurations of an operation are captured first and
then replayed in turn, so that they meet the same clocks, while the next ones are compiled; each is held
against plain PyTorch before, at a batch of 16. What does not compile, does not launch or is wrong is told
too. Nothing is changed: the best values are entered into kernels/ by hand. Exit code 1 where a shipped
configuration failed.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, floors, harness, operations
from benchmarks.harness import Operation
from benchmarks.machine import ABSENT, Record, dry_run
from benchmarks.static import without_interpreter
from benchmarks.static_build import ARCHES
from benchmarks.tune_static import Attempt, Compiled, compile_attempts
from benchmarks.tune_studies import SHIPPED, studies

ROUNDS = 20
CHECKED_BATCH = 16
MOST_SPILLED = 128  # bytes a thread: a few may be worth what they buy
_FIELDS = ("kernel", "registers", "spilled", "shared", "warps_per_multiprocessor")

Row = dict[str, Any]


def described(compiled: Compiled) -> Row:
    """What is known of an attempt before it is run."""
    study, trial, candidate = compiled.attempt
    kernels = [
        {name: value for name, value in report.as_json().items() if name in _FIELDS}
        for report in compiled.reports
    ]
    row: Row = dict(study=study.name, idea=study.idea, case=trial.case, direction=study.direction)
    row |= dict(candidate=candidate.label, kernels=kernels)
    broken = [text for report in compiled.reports for text in report.failures if "spills" not in text]
    if (spilled := max((report.spilled for report in compiled.reports), default=0)) > MOST_SPILLED:
        broken.append(f"spills {spilled} bytes a thread: not run")
    return row | ({"failure": broken[0]} if broken else {})


def timed(group: Sequence[Compiled], batch: int, deadline: float = float("inf")) -> Iterator[Row]:
    """Rows of all configurations of one study on one operation; a row without times has a failure.

    Configurations that are not captured by the deadline are left out, but for the shipped one.

    Raises:
        torch.AcceleratorError: a configuration broke the device, after all rows; nothing was timed.
    """
    study, trial, _ = group[0].attempt
    operation, small = (find(trial.operation, size) for size in (batch, min(batch, CHECKED_BATCH)))
    copies, rows = harness.copies_of(operation), list[Row]()
    rounds: list[tuple[Row, Callable[[], None], int]] = []
    broken: torch.AcceleratorError | None = None
    for compiled in group:
        candidate = compiled.attempt.candidate
        if time.monotonic() > deadline and rows:
            print(f"tune: time is up at {candidate.label} of {study.name}, {trial.case}", file=sys.stderr)
            break
        row = described(compiled) | dict(operation=operation.name, sizes=operation.sizes)
        rows.append(row)
        if "failure" in row:
            continue
        print(f"{study.name} | {trial.case} | {candidate.label} runs", flush=True)  # it may be the last word
        with candidate.applied():
            try:
                harness.verify(small, study.variant)
                rounds.append(
                    (row, *harness.round_of(operation.ours[study.variant], copies, study.direction))
                )
            except Exception as error:  # Triton has no one class for what its compiler and launcher raise
                row["failure"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
                if isinstance(error, torch.AcceleratorError):  # whatever followed would fail
                    broken = error
                    break
    if broken is None:
        stages = harness.stages_of(operation, study.direction)
        floor = floors.floor_seconds(stages, ceilings.measure(harness.DEVICE, harness.DTYPE))
        for (row, _, _), microseconds in zip(rounds, _in_turn(rounds), strict=True):
            median = statistics.median(microseconds)
            row |= dict(
                floor_us=floor * 1e6, percent_of_floor=100e6 * floor / median, microseconds=microseconds
            )
    yield from rows
    if broken is not None:
        raise broken


def _in_turn(rounds: Sequence[tuple[Row, Callable[[], None], int]]) -> list[list[float]]:
    """Microseconds a call in each round; the first round does not count."""
    times: list[list[float]] = [[] for _ in rounds]
    for _ in range(ROUNDS + 1):
        for found, (_, replay, repetitions) in zip(times, rounds, strict=True):
            start = time.perf_counter()
            replay()
            found.append((time.perf_counter() - start) / repetitions * 1e6)
    return [found[1:] for found in times]


def find(pattern: str, batch: int) -> Operation:
    """The operation of the sweep that a trial names."""
    wanted = pattern.replace("{B}", str(batch))
    found = [operation for operation in operations.every(batch) if re.search(wanted, str(operation))]
    if len(found) != 1:
        raise LookupError(f"{wanted} names {len(found)} operations, not one: {', '.join(map(str, found))}")
    return found[0]


def measure(compiled: Iterable[Compiled], batch: int, deadline: float) -> Iterator[Row]:
    """Rows of all attempts, an operation at a time; nothing is begun after the deadline."""
    for (study, trial), group in groupby(compiled, key=lambda one: one.attempt[:2]):
        if time.monotonic() > deadline:
            print(f"tune: time is up before {study.name}, {trial.case}", file=sys.stderr)
            return
        yield from timed(list(group), batch, deadline)
        gc.collect()
        torch.cuda.empty_cache()


def record_of(path: Path | None, arch: str, *, static: bool) -> Record:
    """The result, without rows; without a GPU the device is the arch that was compiled for."""
    if static:
        record = Record(path, "tune", torch.device("cpu"), arch=arch)
        record.result["device"] = arch
        return record
    record = Record(path, "tune", harness.DEVICE, arch=arch)
    record.result["ceilings"] = vars(ceilings.measure(harness.DEVICE, harness.DTYPE))
    return record


def rehearsed(only: str) -> Generator[Compiled, None, None]:
    """For a dry run: the shipped configuration and another one of each study, on its first trial."""
    for study in studies(only):
        for candidate in study.candidates()[:2]:
            yield Compiled(Attempt(replace(study, variant="ours"), study.trials[0], candidate), [])


def told(row: Row) -> str:
    """A line for the terminal."""
    resources = [
        f"{one['registers']} registers, {one['warps_per_multiprocessor']} warps/SM" for one in row["kernels"]
    ]
    spilled = sum(one["spilled"] for one in row["kernels"])
    text = f"{row['study']} | {row['case']} | {row['candidate']} | {'; '.join(resources)}"
    text += f", spills {spilled}" if spilled else ""
    if "microseconds" in row:
        median = statistics.median(row["microseconds"])
        text += f" | {median:.1f} us, {row['percent_of_floor']:.0f}% of the floor"
    return text + (f" | FAILED {row['failure']}" if "failure" in row else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a regular expression for the names of studies")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="nothing is begun after them")
    parser.add_argument("--static", action="store_true", help="compile only")
    parser.add_argument("--arch", choices=list(ARCHES), help="with --static; default: sm_90")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compiling processes")
    parser.add_argument("--results", type=Path, help="write all rows into this JSON file")
    args = parser.parse_args(argv)
    start = time.monotonic()
    without_interpreter()
    if not args.static and not torch.cuda.is_available() and not dry_run():
        print(f"tune: torch {torch.__version__} sees no CUDA device; --static needs none", file=sys.stderr)
        return 1
    arch = args.arch or "sm_90"
    if not args.static and not dry_run():
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        if arch not in ARCHES:
            print(f"tune: there are no limits for {arch}, only for {', '.join(ARCHES)}", file=sys.stderr)
            return ABSENT
    record = record_of(args.results, arch, static=args.static)  # ceilings: while nothing else goes on
    attempts = compile_attempts(args.only, arch, args.jobs) if not dry_run() else rehearsed(args.only)
    with closing(attempts) as compiled:
        measured = measure(compiled, args.batch, start + args.seconds)
        for row in map(described, compiled) if args.static else measured:
            record.result["headline"] = headline([*record.result["rows"], row])
            record.add(row)
            if row["candidate"] == SHIPPED and "failure" in row:
                record.fail(row["failure"], study=row["study"], case=row["case"])
            print(told(row), flush=True)
    return record.end()


def headline(rows: Sequence[Row]) -> str:
    """How many configurations were tried on how much, and what beats the shipped one most."""
    gains: list[tuple[float, str]] = []
    shipped: dict[tuple[str, str], float] = {}
    for row in rows:
        if "microseconds" in row:
            median, key = statistics.median(row["microseconds"]), (row["study"], row["case"])
            first = shipped.setdefault(key, median)  # the shipped configuration comes first
            case = re.sub(r"[\\^$]", "", row["case"])
            gains.append((first / median, f"{row['candidate']} of {row['study']}, {case}"))
    text = f"{len(gains)} of {len(rows)} configurations timed"
    return text + (f"; best {max(gains)[0]:.2f}x the shipped one: {max(gains)[1]}" if gains else "")


if __name__ == "__main__":
    sys.exit(main())
