"""What the compiler makes of the configurations of studies, from all cores; needs no GPU."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

from benchmarks import static_build, static_cases
from benchmarks.operation import kernel_name
from benchmarks.static_build import Build, Report
from benchmarks.tune_studies import Candidate, Study, Trial, studies
from lmim_fast.kernels import runtime


class Attempt(NamedTuple):
    """A configuration on an operation."""

    study: Study
    trial: Trial
    candidate: Candidate


class Compiled(NamedTuple):
    """An attempt, and the kernels of the study that it launches."""

    attempt: Attempt
    reports: list[Report]


def compile_attempts(only: str, arch: str, jobs: int) -> Generator[Compiled, None, None]:
    """Attempts of the studies whose names match, in order, while the next ones are compiled.

    What several of them launch is compiled once. An attempt that launches what an earlier one of its study
    and trial launches is left out.
    """
    recorded = _record(only, arch)
    builds = _distinct(recorded)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _prepare, (only, arch))
    try:
        found = zip(builds, pool.map(partial(_compile, arch), range(len(builds))), strict=True)
        reports: dict[str, Report] = {}
        for attempt, own in recorded:
            while any(build.key not in reports for build in own):
                key, report = next(found)
                reports[key] = report
            yield Compiled(attempt, [reports[build.key] for build in own])
    finally:  # who reads no further does not wait for the rest
        pool.shutdown(wait=False, cancel_futures=True)


def _record(only: str, arch: str) -> list[tuple[Attempt, list[Build]]]:
    number, target = int(arch.removeprefix("sm_")), static_build.target_of(arch)
    cases = list(static_cases.cases())
    recorded: list[tuple[Attempt, list[Build]]] = []
    for study in studies(only):
        for trial in study.trials:
            if not study.compiles:
                recorded += [(Attempt(study, trial, candidate), []) for candidate in study.candidates()]
                continue
            calls = [call for label, call in cases if re.search(trial.case, label)]
            seen: set[str] = set()
            for candidate in study.candidates():
                with candidate.applied(), runtime.recording((number // 10, number % 10)) as recording:
                    for call in calls:
                        call()
                launches = [one for one in recording.launches if study.changes(one.kernel)]
                if not launches:
                    raise RuntimeError(f"no case for {study.name}: {trial.case}")
                told = [
                    (
                        kernel_name(one.kernel),
                        one.grid,
                        one.constants,
                        one.options,
                    )
                    for one in launches
                ]
                if str(told) not in seen:
                    seen.add(str(told))
                    builds = [static_build.specialise(launch, target) for launch in launches]
                    recorded.append((Attempt(study, trial, candidate), builds))
    return recorded


def _distinct(recorded: list[tuple[Attempt, list[Build]]]) -> dict[str, Build]:
    """What there is to compile, in the order in which it is wanted."""
    builds: dict[str, Build] = {}
    for _, own in recorded:
        for build in own:
            builds.setdefault(build.key, build)
    return builds


_builds: list[Build] = []  # of a worker process


def _prepare(only: str, arch: str) -> None:
    """Record all launches in a worker: kernels do not travel between processes.

    It steps back behind the process that takes times meanwhile.
    """
    os.nice(15)
    _builds[:] = _distinct(_record(only, arch)).values()


def _compile(arch: str, number: int) -> Report:
    return static_build.compile_build(_builds[number], arch)
