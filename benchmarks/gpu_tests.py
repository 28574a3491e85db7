"""The tests that are marked `gpu`, a row each as soon as it has run.

    python -m benchmarks.gpu_tests [--results FILE] [pytest arguments]

Only files with such a test are collected: others may import what a GPU machine lacks. With pytest-xdist tests
run in several processes. Exit code 1 if one fails or none passes, 130 if it is interrupted before.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.machine import Record

ROOT = Path(__file__).parents[1]
_PROCESSES = 6
_KEPT = 2000  # characters of a failure


def files() -> list[str]:
    """Test files with a GPU test."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = re.compile(r"^\s*@?(pytestmark = )?pytest\.mark\.gpu\b", re.MULTILINE)
    return [str(path.relative_to(ROOT)) for path in found if marked.search(path.read_text("utf-8"))]


class Reporter:
    """A pytest plugin that files tests and what fails to be collected."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._record.add(dict(test=report.nodeid, outcome=report.outcome, seconds=report.duration))
        if report.failed:
            self._record.fail(report.longreprtext[-_KEPT:], test=report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._record.fail(report.longreprtext[-_KEPT:], test=report.nodeid)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="JSON file")
    args, rest = parser.parse_known_args(argv)
    record = Record(args.results, "tests", harness.DEVICE)
    options = rest or ["-m", "gpu", "-v", "--durations=10", "--tb=short", "-W", "default", *files()]
    if not rest and find_spec("xdist") is not None:
        options += ["-n", str(_PROCESSES)]
    code = pytest.main(options, plugins=[Reporter(record)])
    counts = Counter(row["outcome"] for row in record.result["rows"])
    failed = len(record.result["failed"])
    record.result["headline"] = f"{counts['passed']} passed, {failed} failed, {counts['skipped']} skipped"
    if code == pytest.ExitCode.INTERRUPTED and not failed:  # its time was up
        record.write()
        return 130
    if not counts["passed"] or (code != pytest.ExitCode.OK and not failed):
        record.fail(f"pytest ended with {code!r}")
    return record.end()


if __name__ == "__main__":
    sys.exit(main())
