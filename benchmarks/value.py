"""What pre-training is worth: one fine-tuning from scratch, from MAE and from LMIM, on the same data.

    python -m benchmarks.value --jobs 2                   # two cores, about an hour: rendered digits
    python -m benchmarks.value --output runs/value --size small \\
        --train LMDB --test NAME=LMDB --unlabelled LMDB   # one GPU, about ten minutes

Compared at equal fine-tuning steps, and at equal total time: there the runs that skip a stage fine-tune for
as many steps more as that stage took. Each row is over several seeds of fine-tuning; encoders are made once.
A second call goes on where the first one ended. `OUTPUT/value.md` and `value.json` are the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.tables_value import value
from benchmarks.value_data import rendered_digits

# Options of both trainings and of each, by size. The tiny problem was chosen so that training from scratch
# ends between 20 and 80 %: patches of 8, one or two digits in three fonts, ten classes that occur.
MODEL = ("--model.encoder.patch-size", "8", "--model.encoder.pos-grid", "true")
PRETRAIN_MODEL = ("--model.patch-size", "8", "--model.pos-grid", "true")
BOTH = ("--optim.lr", "1e-3", "--log-every", "50", "--loader.threads", "1")
DIGITS = ("--charset", "36", "--model.max-length", "4", "--augment.kind", "none")


@dataclass(frozen=True)
class Size:
    """Preset, options and steps of a comparison."""

    preset: str
    pretrain: tuple[str, ...]
    finetune: tuple[str, ...]
    mae_steps: int
    lmim_steps: int
    finetune_steps: int


SIZES = {
    "tiny": Size(
        preset="tiny",
        pretrain=(*PRETRAIN_MODEL, *BOTH, "--batch-size", "64"),
        finetune=(*MODEL, *BOTH, *DIGITS, "--batch-size", "32"),
        mae_steps=800,
        lmim_steps=600,
        finetune_steps=1200,
    ),
    "small": Size(
        preset="small",
        pretrain=("--batch-size", "512", "--cuda-graph"),
        finetune=("--batch-size", "512", "--cuda-graph"),
        mae_steps=700,
        lmim_steps=500,
        finetune_steps=500,
    ),
}
STARTS = ("scratch", "mae", "lmim")


class Comparison:
    """Runs the stages by the command line that users have, and reads what they left.

    Args:
        size:    what is run.
        folder:  of all runs.
        train:   labelled LMDB folders.
        tests:   test sets as `lmim evaluate` takes them.
        unlabelled: LMDB folders to pre-train on.
        seeds:   of the fine-tunings.
        jobs:    runs at a time; they share the cores.
        lmim:    runs a command.
    """

    def __init__(
        self,
        size: Size,
        folder: Path,
        *,
        train: Sequence[str],
        tests: Sequence[str],
        unlabelled: Sequence[str],
        seeds: Sequence[int],
        jobs: int = 1,
        lmim: Callable[[Sequence[str], int], None] | None = None,
    ) -> None:
        self.size, self.folder, self.seeds, self.jobs = size, folder, list(seeds), jobs
        self.train, self.tests, self.unlabelled = list(train), list(tests), list(unlabelled)
        self._lmim = lmim or run_lmim
        self._pool = ThreadPoolExecutor(jobs)

    def run(self) -> dict[str, Any]:
        """All stages; what is done already is not done again."""
        steps = self.size.finetune_steps
        mae = self._pool.submit(self.pretrain, "mae")
        scratch = self.row("scratch", steps)  # beside the pre-training
        mae.result()
        lmim = self._pool.submit(self.pretrain, "lmim")
        rows = [self.result("scratch", scratch), self.result("mae", self.row("mae", steps))]
        lmim.result()
        rows.append(self.result("lmim", self.row("lmim", steps)))
        for row in rows:
            row["at"] = "equal steps"
        before = {start: self.before(start) for start in STARTS}
        whole = rows[-1]["seconds"]
        longer = {}
        for row in rows[:2]:
            start = row["start"]
            a_step = (row["seconds"] - before[start]) / steps
            longer[start] = self.row(start, round((whole - before[start]) / a_step))
        rows += [{**self.result(start, runs), "at": "equal time"} for start, runs in longer.items()]
        rows.append({**rows[2], "at": "equal time"})
        size = dataclasses.asdict(self.size)
        return {
            "rows": rows,
            "pretraining_seconds": before,
            "seeds": self.seeds,
            "jobs": self.jobs,
            "size": size,
        }

    def before(self, start: str) -> float:
        """Seconds of pre-training."""
        stages = {"scratch": (), "mae": ("mae",), "lmim": ("mae", "lmim")}[start]
        return sum(seconds_of(self.folder / stage) for stage in stages)

    def pretrain(self, objective: str) -> None:
        """Make an encoder."""
        run = self.folder / objective
        if (run / "encoder.safetensors").is_file():
            return
        teacher = ["--teacher", str(self.folder / "mae")] if objective == "lmim" else []
        steps = self.size.mae_steps if objective == "mae" else self.size.lmim_steps
        arguments = ["pretrain", "--objective", objective, "--preset", self.size.preset, *teacher]
        arguments += ["--data", *(self.unlabelled or self.train), "--output", str(run), "--steps", str(steps)]
        arguments += ["--optim.warmup-steps", str(steps // 20), *self.size.pretrain]
        self._lmim(arguments, self.jobs)

    def row(self, start: str, steps: int) -> list[Future[Path]]:
        """Fine-tune and evaluate with every seed."""
        return [self._pool.submit(self.finetune, start, steps, seed) for seed in self.seeds]

    def finetune(self, start: str, steps: int, seed: int) -> Path:
        """One fine-tuning and its evaluation; the run folder."""
        run = self.folder / f"{start}-{steps}-seed{seed}"
        if not (run / "evaluation" / "evaluation.json").is_file():
            init = [] if start == "scratch" else ["--init", str(self.folder / start)]
            arguments = ["finetune", "--preset", self.size.preset, "--data", *self.train, *init]
            arguments += ["--output", str(run), "--steps", str(steps), "--seed", str(seed)]
            arguments += ["--optim.warmup-steps", str(steps // 20), *self.size.finetune]
            self._lmim(arguments, self.jobs)
            self._lmim(["evaluate", str(run), *self.tests], self.jobs)
        return run

    def result(self, start: str, runs: list[Future[Path]]) -> dict[str, Any]:
        """Accuracies in % and mean seconds, pre-training included, of finished runs."""
        folders = [run.result() for run in runs]
        scores: dict[str, list[float]] = {}
        for folder in folders:
            document = json.loads((folder / "evaluation" / "evaluation.json").read_text())
            for entry in document["sets"]:
                scores.setdefault(entry["name"], []).append(entry["accuracy"])
        steps = int(folders[0].name.split("-")[1])
        seconds = self.before(start) + statistics.mean(map(seconds_of, folders))
        return {"start": start, "steps": steps, "seconds": seconds, "scores": scores}


def seconds_of(run: Path) -> float:
    """Training time of a run, its sittings added up."""
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    seconds: float = json.loads(last)["elapsed_seconds"]
    return seconds


def run_lmim(arguments: Sequence[str], jobs: int) -> None:
    """`lmim` in a process of its own, on its share of the cores."""
    environment = dict(os.environ)
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    command = [sys.executable, "-m", "lmim_fast.cli", *arguments]
    subprocess.run(command, check=True, env=environment)


def main() -> None:
    options = _options()
    size = SIZES[options.size]
    changes = {name: value for name, value in vars(options).items() if name.endswith("_steps") and value}
    size = dataclasses.replace(
        size,
        **changes,
        pretrain=(*size.pretrain, *options.pretrain.split()),
        finetune=(*size.finetune, *options.finetune.split()),
    )
    options.output.mkdir(parents=True, exist_ok=True)
    train, tests = options.train, options.test
    if not train:
        train, digits = rendered_digits(options.output / "data")
        tests = [digits, *tests]
    comparison = Comparison(
        *(size, options.output),
        train=train,
        tests=tests,
        unlabelled=options.unlabelled,
        seeds=options.seeds,
        jobs=options.jobs,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"benchmark": "value", **describe(device), "data": options.about, **comparison.run()}
    (options.output / "value.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "value.md").write_text(value(result) + "\n")
    print(value(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/value"))
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--train", nargs="*", default=[], help="labelled LMDB folders; none: rendered digits")
    parser.add_argument("--test", nargs="*", default=[], help="test sets as `lmim evaluate` takes them")
    parser.add_argument("--unlabelled", nargs="*", default=[], help="LMDBs to pre-train on; none: --train")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--about", default="rendered digits", help="what the data is, for the table")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    for stage in ("mae", "lmim", "finetune"):
        parser.add_argument(f"--{stage}-steps", type=int)
    parser.add_argument("--pretrain", default="", help="more options of `lmim pretrain`, in one string")
    parser.add_argument("--finetune", default="", help="more options of `lmim finetune`, in one string")
    return parser.parse_args()


if __name__ == "__main__":
    main()
