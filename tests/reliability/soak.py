"""Trains again and again under injected trouble, and says whether every run ended with the right weights.

    python tests/reliability/soak.py --minutes 30 --output /tmp/soak

A round is one training, from an empty run folder to its end, in as many lives as its trouble makes of it; its
weights must then be those of a run without any. Beside the rounds another group trains all the time, whose
memory, open files and threads must not grow. Exit code 0: all of this held.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

sys.path[:0] = [str(folder) for folder in Path(__file__).parents[:3]]  # for the next two

from fault_runs import Group, same_bits, tensors_of  # noqa: E402
from pretrain_runs import curve, options, write_lmdb  # noqa: E402

STEPS, EVERY = 200, 10  # of a round; steps between its checkpoints
RECORDS, BROKEN = 60, (7, 31, 52)
MODES = ("replicate", "shard", "mixed")  # mixed: each life draws one of the others
TROUBLES = ("kill -9", "SIGTERM", "kill in a save", "full disk")
SLOW = "slow disk"  # comes with one of the first two
MOST_LIVES = 6  # with trouble; then a round may end
LIMIT = 240.0  # seconds of a life
CLOSE = 1e-3  # of weights and losses, relative to the largest, where summation orders differ
FLAT_BYTES, FLAT_FILES = 16 * 2**20, 3  # what a process may have more at the end than after its first tenth


@dataclass
class Round:
    """One training in several lives."""

    mode: str
    lives: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    """By torchrun."""
    again: int = 0
    """Steps that were done more than once."""
    verdict: str = ""
    problems: list[str] = field(default_factory=list)


class Sample(NamedTuple):
    """What one process holds at a moment."""

    memory: int
    files: int
    threads: int


class Soak:
    """The rounds.

    Args:
        folder: for data, runs and output of lives; what went wrong is left there.
        ranks:  processes of a run.
        seed:   of every draw.
        until:  moment after which trouble ends.
    """

    def __init__(self, folder: Path, ranks: int, seed: int, until: float) -> None:
        self.folder, self.ranks, self.until = folder, ranks, until
        self._draw, self._deck = random.Random(seed), list[str]()
        self.data = write_lmdb(folder / "data", RECORDS, broken=BROKEN)
        self.held_out = write_lmdb(folder / "held_out", 16)
        self.rounds: list[Round] = []

    def options(self, run: Path, mode: str, *more: str, steps: int = STEPS) -> list[str]:
        """Of all runs."""
        kept = ("--checkpoint-every", str(EVERY), "--keep-checkpoints", "2")
        measured = ("--eval-data", str(self.held_out), "--eval-every", "20", "--eval-images", "16")
        return options(self.data, run, "--parallel", mode, *kept, *measured, *more, steps=steps)

    def make_references(self) -> None:
        """Runs without trouble; also how long one trains."""
        for mode in MODES[:2]:
            run = self.reference(mode)
            with Group(self.options(run, mode), run, ranks=self.ranks) as group:
                assert group.wait(LIMIT) == 0, group.text
                first = next(moment for moment, text in group.lines if text.startswith("step 1/"))
                self._seconds = group.lines[-1][0] - first
        self.closeness = distance(self.reference("replicate"), self.reference("shard"))

    def reference(self, mode: str) -> Path:
        """Folder of the run without trouble that a round of this mode is compared with."""
        return self.folder / f"reference-{'replicate' if mode == 'mixed' else mode}"

    def round(self) -> None:
        """Train once, from start to end."""
        number = len(self.rounds) + 1
        this = Round(MODES[(number - 1) % len(MODES)])
        self.rounds.append(this)
        run, steps = self.folder / f"round-{number:03d}", 0
        while True:
            late = time.monotonic() > self.until or this.lives >= MOST_LIVES
            trouble = "none" if late else self._trouble()
            ended, group = self._life(this, run, trouble)
            log = self.folder / f"{run.name}-life-{this.lives}.log"
            log.write_text(f"{trouble}\n{group.text}\n")
            steps += sum("  loss " in text for _, text in group.lines)
            if ended or this.problems:
                break
        this.again = max(0, steps - STEPS)
        if not this.problems:
            self._judge(this, run)
        if this.problems:
            print(f"round {number}: {'; '.join(this.problems)}", flush=True)
            return
        shutil.rmtree(run)
        for log in self.folder.glob(f"{run.name}-*.log"):
            log.unlink()

    def _trouble(self) -> str:
        """The next kind: all of them come before one comes again."""
        if not self._deck:
            self._deck = self._draw.sample(TROUBLES, len(TROUBLES))
        return self._deck.pop()

    def _life(self, this: Round, run: Path, trouble: str) -> tuple[bool, Group]:
        """Start the run, or start it again, and trouble it; whether it came to its end."""
        draw, rank = self._draw, self._draw.randrange(self.ranks)
        mode = draw.choice(MODES[:2]) if this.mode == "mixed" else this.mode
        layout = draw.choice(("whole", "sharded"))
        restarts, save = draw.randrange(2), draw.randint(1, 8)
        early = draw.random() < 0.2  # before the first step, not after it
        seconds, faults = draw.uniform(1, 5) if early else draw.uniform(0, self._seconds / 2), ""
        if trouble == "kill in a save":
            faults = f"{draw.choice(('gather', 'save', 'commit', 'retention'))}@{save}:life0=kill"
        elif trouble == "full disk":
            faults, restarts = f"{draw.choice(('save', 'commit'))}@{save}=full", 0
        elif trouble != "none" and draw.random() < 0.5:
            faults = "save=slow"
        this.lives += 1
        arguments = self.options(run, mode, "--checkpoint-layout", layout)
        with Group(arguments, run, ranks=self.ranks, restarts=restarts, faults=faults) as group:
            if trouble in ("kill -9", "SIGTERM"):
                with contextlib.suppress(AssertionError, psutil.NoSuchProcess, ProcessLookupError):
                    if not early:
                        group.wait_for("  loss ")
                    time.sleep(seconds)
                    process = group.rank(rank) if trouble == "kill -9" else psutil.Process(group.launcher.pid)
                    process.kill() if trouble == "kill -9" else process.terminate()
                    this.faults[trouble] += 1
            try:
                code = group.wait(LIMIT)
            except AssertionError:
                this.problems.append(f"life {this.lives} ({trouble}) did not end in {LIMIT:.0f} s")
                return False, group
            if left := group.processes():
                this.problems.append(f"life {this.lives} ({trouble}) left {len(left)} processes")
        for kind, sign in (("kill in a save", "kill"), ("full disk", "full"), (SLOW, "slow")):
            this.faults[kind] += f"fault: {sign} " in group.text
        this.restarts += max(0, group.text.count("learning rate: ") - 1)
        ended = code == 0 and (run / "encoder.safetensors").exists()
        if trouble == "none" and not ended:
            this.problems.append(f"life {this.lives} ({trouble}) ended with {code} before its end")
        if trouble == "full disk" and not ended and "error: disk full while writing" not in group.text:
            this.problems.append(f"life {this.lives}: no clear error of a full disk")
        return ended, group

    def _judge(self, this: Round, run: Path) -> None:
        wanted = self.reference(this.mode)
        if [line["step"] for line in curve(run)] != list(range(1, STEPS + 1)):
            this.problems.append("a step is missing in metrics.jsonl, or twice there")
        elif this.mode == "mixed":
            far = distance(run, wanted)
            this.verdict = "yes" if far == 0 else f"no, within {far:.0e}"
            if far > CLOSE:
                this.problems.append(f"weights or losses are off by {far:.1e}")
        else:
            evaluations = [(folder / "eval.jsonl").read_text() for folder in (run, wanted)]
            equal = curve(run) == curve(wanted) and same_bits(run, wanted, STEPS)
            this.verdict = "yes" if equal and evaluations[0] == evaluations[1] else "NO"
            if this.verdict == "NO":
                this.problems.append(f"not the bits of {wanted.name}")


def distance(run: Path, other: Path) -> float:
    """The largest difference of weights, moments and losses of two finished runs, relative to their size."""
    found, wanted = tensors_of(run, STEPS), tensors_of(other, STEPS)
    far = [0.0]
    for name, tensor in wanted.items():
        scale = max(tensor.double().abs().max().item(), 1e-30)
        far.append((found[name].double() - tensor.double()).abs().max().item() / scale)
    for line, expected in zip(curve(run), curve(other), strict=True):
        far.append(abs(line["loss"] - expected["loss"]) / abs(expected["loss"]))
    return max(far)


class LongLived:
    """A group that trains beside the rounds and is never killed; context manager."""

    def __init__(self, soak: Soak) -> None:
        run = soak.folder / "long"
        # Two checkpoints a second: each step waits half a second.
        more = ("--checkpoint-layout", "whole", "--checkpoint-every", "1")
        arguments = soak.options(run, "replicate", *more, steps=10**6)
        self._group = Group(arguments, run, ranks=soak.ranks, faults="step:rank0=slow")
        self._ranks, self._over = soak.ranks, threading.Event()
        self.samples: list[list[Sample]] = []
        """Of each moment, those of all ranks."""
        self.steps = 0
        self.problem = ""
        self._sampler = threading.Thread(target=self._sample)

    def __enter__(self) -> LongLived:
        self._group.__enter__()
        self._group.wait_for("  loss ")
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._sampler.join()
        try:
            self._group.launcher.terminate()
            self._group.wait(60)
            self.steps = sum("  loss " in text for _, text in self._group.lines)
            if "stopped by SIGTERM" not in self._group.text:
                self.problem = f"the long run ended by itself: {self._group.text[-2000:]}"
        except AssertionError as error:
            self.problem = str(error)[-2000:]
        finally:
            self._group.__exit__()

    def _sample(self) -> None:
        processes = [self._group.rank(rank) for rank in range(self._ranks)]
        with contextlib.suppress(psutil.Error, OSError):
            while not self._over.wait(1.0):
                self.samples.append([sample(process.pid) for process in processes])

    def at(self, share: float) -> list[Sample]:
        """What each rank held at this share of the time: medians over a twentieth of it around."""
        count = len(self.samples)
        width = max(3, count // 20)
        first = min(max(0, int(share * count) - width // 2), max(0, count - width))
        window = self.samples[first : first + width]
        medians = torch.tensor(window).median(0).values  # (ranks, 3)
        return [Sample(*rank) for rank in medians.tolist()]

    def growth(self) -> list[str]:
        """What is not flat after the first tenth."""
        found = []
        for rank, (first, last) in enumerate(zip(self.at(0.1), self.at(1.0), strict=True)):
            if last.memory - first.memory > FLAT_BYTES:
                found.append(f"rank {rank}: memory grew by {(last.memory - first.memory) / 2**20:.1f} MB")
            if last.files - first.files > FLAT_FILES or last.threads - first.threads > FLAT_FILES:
                found.append(f"rank {rank}: files or threads grew from {first} to {last}")
        return found


def sample(pid: int) -> Sample:
    """Of a process, from /proc."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(int(status["VmRSS"].split()[0]) * 1024, files, int(status["Threads"]))


def report(soak: Soak, long: LongLived, minutes: float) -> list[str]:
    """Print the tables; what did not hold."""
    print(f"\n{'round':>5}  {'mode':<10}{'lives':>6}{'restarts':>9}{'again':>6}  {'bitwise':<18}faults")
    for number, one in enumerate(soak.rounds, 1):
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(one.faults.items()) if count)
        print(
            f"{number:>5}  {one.mode:<10}{one.lives:>6}{one.restarts:>9}{one.again:>6}  "
            f"{one.verdict or 'FAILED':<18}{faults}"
        )
    faults = sum((one.faults for one in soak.rounds), Counter[str]())
    print(f"\n{minutes:.1f} minutes, {len(soak.rounds)} rounds of {STEPS} steps at {soak.ranks} ranks")
    for what in ("lives", "restarts", "again"):
        print(f"{what}: {sum(getattr(one, what) for one in soak.rounds)}")
    print("faults: " + ", ".join(f"{kind} {faults[kind]}" for kind in (*TROUBLES, SLOW)))
    print(f"replicate and shard without trouble differ by {soak.closeness:.0e}")
    print(f"never killed: {long.steps} steps, a checkpoint after each")
    print(f"\n{'time':>5}" + "".join(f"   rank {rank}: RSS MB  files  threads" for rank in range(soak.ranks)))
    for share in (0.1, 0.5, 1.0) if long.samples else ():
        held = (f"{s.memory / 2**20:>18.1f}{s.files:>7}{s.threads:>9}" for s in long.at(share))
        print(f"{share:>5.0%}" + "".join(held))
    problems = [problem for one in soak.rounds for problem in one.problems]
    problems += [long.problem] if long.problem else long.growth()
    return problems


def main(argv: list[str] | None = None) -> int:
    """Soak for a time; 0 if all held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="after it the round in progress ends")
    parser.add_argument("--ranks", type=int, default=2, help="processes of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the trouble")
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    chosen = parser.parse_args(argv)
    chosen.output.mkdir(parents=True)
    torch.set_num_threads(1)
    started = time.monotonic()
    soak = Soak(chosen.output, chosen.ranks, chosen.seed, started + 60 * chosen.minutes)
    with LongLived(soak) as long:
        soak.make_references()
        while time.monotonic() < soak.until or not soak.rounds:
            soak.round()
    problems = report(soak, long, (time.monotonic() - started) / 60)
    print("\n" + ("verdict: all held" if not problems else "verdict: FAILED\n" + "\n".join(problems)))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
