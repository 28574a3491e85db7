"""A run in several sittings, each of other processes and options, and the samples that it trained on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import warm
from pretrain_runs import ENVIRONMENT
from recorded import recording

import lmim_fast
from lmim_fast import cli
from lmim_fast.faults import VARIABLE, Fault, injected

RECORDED = Path(__file__).with_name("recorded.py")
# A script has its own folder first on its path: it would import the package that is installed, not this one.
_PATH = os.pathsep.join(
    filter(None, [str(Path(lmim_fast.__file__).parents[1]), os.environ.get("PYTHONPATH")])
)


def run_limited(
    command: list[str], *, faults: str = "", seconds: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; after `seconds` it fails. No process of it is left, however it ends."""
    process = subprocess.Popen(
        command,
        env={**ENVIRONMENT, VARIABLE: faults, "PYTHONPATH": _PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:  # torchrun's processes have sessions of their own
            member.kill()
        out, err = process.communicate()
        raise AssertionError(f"not done after {seconds:g} s: {' '.join(command)}\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def command(script: list[str], processes: int | None) -> list[str]:
    """A Python script as one process, or as `processes` of torchrun."""
    if processes is None:
        return [sys.executable, *script]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *torchrun, *script]


def _record(folder: Path, arguments: list[str]) -> int:
    with recording(folder):
        return cli.main(arguments)


class Sittings:
    """Sittings of one run.

    Args:
        folder:    of what is recorded.
        arguments: of `lmim`, for every sitting.
    """

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._folder, self._arguments, self._count = folder, arguments, 0

    def sit(
        self, *more: str, processes: int | None = None, steps: int | None = None, killed: int | None = None
    ) -> None:
        """Start or continue the run.

        Args:
            more:      options of this sitting.
            processes: that train together, of torchrun if one is killed; None: this process.
            steps:     after that many a SIGTERM comes; None: to the end of the run.
            killed:    before that step of the sitting, from 1, rank 0 is killed by signal 9.
        """
        here = self._folder / f"sitting-{self._count:02d}"
        here.mkdir(parents=True)
        self._count += 1
        arguments = [*self._arguments, *more]
        if processes is None and killed is None:
            faults = [Fault("step", "term", at=steps)] if steps else []
            said = io.StringIO()
            with recording(here), injected(*faults), contextlib.redirect_stdout(said):
                code = cli.main(arguments)
            out, err = said.getvalue(), ""
        elif killed is None:
            text = f"step@{steps}:rank0=term" if steps else ""
            ranks = warm.Ranks(_record, here, arguments, size=processes, faults=text).wait()
            code, out = max(abs(rank.returncode) for rank in ranks), ranks[0].stdout
            err = "".join(rank.stderr for rank in ranks)
        else:
            text = f"step@{killed}:rank0=kill"
            done = run_limited(command([str(RECORDED), str(here), *arguments], processes), faults=text)
            code, out, err = done.returncode, done.stdout, done.stderr
        assert (code == 0) == (killed is None), err
        assert ("stopped by SIGTERM" in out) == (steps is not None), out

    def samples(self) -> list[list[object]]:
        """Epoch, index and digest of every sample that went into the weights, in global order.

        Of a step that was lost with its process the one that was made again counts.
        """
        steps: dict[int, dict[tuple[int, int], list[list[object]]]] = {}
        for sitting in sorted(self._folder.iterdir()):
            paths = sorted(sitting.iterdir())
            lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
            first = min(line["step"] for line in lines)
            steps = {step: places for step, places in steps.items() if step < first}
            for line in lines:
                place = line["micro"], line["rank"]
                places = steps.setdefault(line["step"], {})
                assert place not in places, f"step {line['step']} has two parts {place}"
                places[place] = line["samples"]
        assert sorted(steps) == list(range(len(steps)))
        parts = [part for _, places in sorted(steps.items()) for _, part in sorted(places.items())]
        return [sample for part in parts for sample in part]
