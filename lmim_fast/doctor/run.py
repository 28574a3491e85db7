"""`lmim doctor`: all checks in order, shown as they come, for people and as JSON."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from lmim_fast import durable
from lmim_fast.config import DoctorConfig, DoctorFinetuneConfig, DoctorPretrainConfig, RunConfig
from lmim_fast.config.io import run_from_dict, to_dict
from lmim_fast.data.visible import beneath, visible
from lmim_fast.doctor.findings import Finding, Findings, Level
from lmim_fast.doctor.machine import check_machine
from lmim_fast.doctor.packages import check_packages
from lmim_fast.doctor.plan import load_config, make_plan
from lmim_fast.errors import LmimError, UsageError

_COLORS: dict[Level, str] = {"ok": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_LEVEL, _WHAT = 9, 13  # characters of the first two columns


def run_doctor(config: DoctorConfig | DoctorPretrainConfig | DoctorFinetuneConfig) -> None:
    """Check the machine, and the run that the config names or is.

    Raises:
        UsageError: a path does not exist, or the findings cannot be written.
        LmimError:  a check found an error; all were made.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UsageError(
            "doctor is one process: start it without torchrun and pass --processes; `unset WORLD_SIZE` if it "
            f"is left over (it is {os.environ['WORLD_SIZE']!r})"
        )
    if config.json is not None and not Path(config.json).absolute().parent.is_dir():
        raise UsageError(f"--json {config.json}: its folder does not exist; make it first")
    run = _run_of(config)
    findings = Findings(_printer(sys.stdout))
    with _quiet():
        check_packages(findings)
        check_machine(findings)
        if run is not None:
            _check_run(run, config.processes, findings)
    errors, warnings = findings.count("error"), findings.count("warning")
    if config.json is not None:
        _write(Path(config.json), findings)
    print(f"{_number(errors, 'error')}, {_number(warnings, 'warning')}")
    if errors:
        raise LmimError(f"{_number(errors, 'check')} failed; the lines above say what to do")


def _run_of(config: DoctorConfig | DoctorPretrainConfig | DoctorFinetuneConfig) -> RunConfig | None:
    if isinstance(config, DoctorConfig):
        return load_config(config.run[0]) if config.run else None
    own = {"json", "processes"}
    return run_from_dict({name: value for name, value in to_dict(config).items() if name not in own})


def _check_run(config: RunConfig, processes: int, findings: Findings) -> None:
    plan = make_plan(config, processes, findings)
    if plan is None:
        return
    # Late: these need what may be missing, and a line has said so by now.
    checks = findings.check("run")
    with checks:
        from lmim_fast.doctor.data import check_data
        from lmim_fast.doctor.disk import check_disk
        from lmim_fast.doctor.dry_run import check_batches, check_model, check_step

        check_data(plan, findings)
        check_model(plan, findings)
        check_disk(plan, findings)
        batch = check_batches(plan, findings)
        check_step(plan, batch, findings)
        if plan.store is not None:
            plan.store.close()


def _printer(stream: TextIO) -> Callable[[Finding], None]:
    """One line a finding; on a terminal in colour and wrapped."""
    terminal = stream.isatty()
    colored = terminal and "NO_COLOR" not in os.environ

    def show(finding: Finding) -> None:
        text = f"{finding.text} - {finding.advice}" if finding.advice else finding.text
        line = f"{visible(finding.what):{_WHAT}}{visible(' '.join(text.split()))}"
        if terminal:
            width = max(40, shutil.get_terminal_size().columns - 1 - _LEVEL)
            lines = textwrap.wrap(
                line, width, subsequent_indent=" " * _WHAT, break_long_words=False, break_on_hyphens=False
            )
            line = ("\n" + " " * _LEVEL).join(lines)
        level = f"{finding.level:{_LEVEL}}"
        if colored:
            level = f"{_COLORS[finding.level]}{level}\x1b[0m"
        print(level + line, file=beneath(stream), flush=True)

    return show


def _write(path: Path, findings: Findings) -> None:
    document = {
        "errors": findings.count("error"),
        "warnings": findings.count("warning"),
        "findings": [asdict(finding) for finding in findings.entries],
        "figures": findings.figures,
    }
    try:
        durable.write_file(path, (json.dumps(document, indent=1) + "\n").encode())
    except OSError as error:
        raise UsageError(f"--json {path}: cannot be written ({error.strerror})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of the parts that are checked: the findings say it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
