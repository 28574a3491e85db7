"""The stages of a run on a GPU machine: which parts, in which order, and how long.

1 light   kernels compiled; those under suspicion alone; the model against the oracle; the step, its profile;
          the products and kernels that it is made of; memcheck of the suspicious ones. No torch.compile.
2 rivals  the step against the strongest plain PyTorch and the released structure, with dropout, at B=64
3 checks  the tests marked gpu, memcheck of every kernel (racecheck is reported)
4 tune    launch configurations of attention, GELU in the epilogue and the backward pass of norms

What is worth most comes first: that the kernels are right, then the step, then where its time goes. A part
has a process of its own, since a broken CUDA context ends whatever shares it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

NAMES = {1: "light", 2: "rivals", 3: "checks", 4: "tune"}
SECONDS = 190.0  # of a stage
_ON_A_DEVICE = ("ours+graph", "ours+epilogue", "ours+bias", "ours+rows")
_TINY = ["--device", "cpu", "--preset", "tiny", "--batch", "2"]
_SUSPICIOUS = "^(self|cross)_attention decoder"  # heads of 32: see docs/KERNELS.md
_OF_THE_STEP = r"^(?!.*(ViT-B|heads of|linear|photometric|pixel|embed of| float16)).*(bfloat16|51 of 256)"
_TIMED = [
    "^linear",
    r"^self_attention (ViT-S|decoder) B\d+ N(257|52)",
    r"^cross_attention decoder B\d+ N205",
    r"^(dropout_add_)?layer_norm ViT-S B\d+ N257$",
    r"^bias_gelu ViT-S B\d+ N257$",
]
_TIMED_DRY = [r"^linear_\w+ ViT-S .*inputs384 outputs384", "^self_attention ViT-S .* N52", "^layer_norm"]


class Part(NamedTuple):
    """A command `python -m ...`, and its share of the time of the stage, in seconds.

    files:   it takes `--results` and writes its figures there.
    option:  takes the seconds after which it begins nothing more: `reserve` fewer than it has.
    reports: what is red in it is told, and does not count.
    remedy:  LMIM_FAST_ROUTES for the parts after it, if it is not green; but for one that is not `routed`.
    """

    name: str
    command: list[str]
    seconds: float
    files: bool = True
    option: str = ""
    reserve: int = 0
    reports: bool = False
    remedy: str = ""
    routed: bool = True

    def line(self, results: Path, seconds: float) -> list[str]:
        """The command for so many seconds."""
        line = [sys.executable, "-m", *self.command]
        line += ["--results", str(results)] if self.files else []
        return line + ([self.option, str(max(1, int(seconds - self.reserve)))] if self.option else [])


def parts(stage: int, folder: Path, arch: str, dry: bool) -> list[Part]:
    """Parts of a stage in their order; `dry`: stand-ins on a CPU with tiny shapes."""
    return {1: _light, 2: _rivals, 3: _checks, 4: _tune}[stage](folder, arch, dry)


def _light(folder: Path, arch: str, dry: bool) -> list[Part]:
    size = _TINY if dry else ["--device", "cuda", "--preset", "small"]
    batch = [] if dry else ["--batch", "512"]
    steps = ["--steps", "1"] if dry else []
    hazard = ["benchmarks.kernel_pass", "--only", _SUSPICIOUS, "--batch", *(["1"] if dry else ["16", "512"])]
    parity = ["benchmarks.parity", *size, *([] if dry else ["--batch", "64"])]
    profile = ["benchmarks.step_profile", *size, *batch, *steps, *_variants(dry, "ours", "ours+graph")]
    timed = ["--only", *(_TIMED_DRY if dry else _TIMED), "--batch", "1" if dry else "512"]
    memcheck = ["benchmarks.sanitize", "--tool", "memcheck", "--only", _SUSPICIOUS]
    return [
        _compile(arch, _OF_THE_STEP, 25, dry),
        Part("hazard", hazard, 20, remedy="attention.backward.32=cudnn"),
        Part("parity", parity, 20),
        _step("step", 35, dry, "ours", "ours+graph"),
        Part("profile", profile, 20),
        Part("ops", ["benchmarks.ops_run", *timed], 45),
        Part("memcheck", memcheck, 25, option="--seconds", reserve=3, routed=False),
    ]


def _rivals(folder: Path, arch: str, dry: bool) -> list[Part]:
    variants = "ours", "ours+epilogue", "ours+bias", "ours+rows", "compiled", "ours+compile"
    return [
        _compile(arch, _OF_THE_STEP.replace("linear|", ""), 15, dry),
        _step("step", 130, dry, *variants, more=["--search", "70"]),
        _step("released", 15, dry, "released"),  # 63 GB at B=512: the others would not fit beside it
        _step("dropout", 15, dry, "ours", "ours+graph", dropout="0.1"),
        _step("batch64", 15, dry, "ours", "ours+graph", batch="64"),
    ]


def _checks(folder: Path, arch: str, dry: bool) -> list[Part]:
    stand_in = ["-q", "-n", "0", "-p", "no:cacheprovider", "tests/benchmarks/test_floors.py"]
    tests = ["benchmarks.gpu_tests", *(stand_in if dry else [])]
    return [
        _compile(arch, "bfloat16", 30, dry),
        Part("tests", tests, 90),
        Part("sanitize", ["benchmarks.sanitize", "--report", "racecheck"], 70, option="--seconds", reserve=3),
    ]


def _tune(folder: Path, arch: str, dry: bool) -> list[Part]:
    studies = [
        ("backward", "^attention backward", 70),
        ("forward", "^attention (forward|backend)", 50),
        ("epilogue", "^GELU in the epilogue", 40),
        ("norm", r"^add \+ LayerNorm backward", 30),
    ]
    size = ["--batch", "2"] if dry else []
    return [
        Part(name, ["benchmarks.tune", "--only", only, *size], seconds, option="--seconds", reserve=8)
        for name, only, seconds in studies
    ]


def _compile(arch: str, only: str, seconds: float, dry: bool) -> Part:
    """From all cores, so that the others need not. A spilled register is told; it counts in `make static`."""
    chosen = "^add . LayerNorm ViT-S .* bfloat16, residual bfloat16" if dry else only
    jobs = "1" if dry else str(len(os.sched_getaffinity(0)))
    command = ["benchmarks.static", "--arch", arch, "--only", chosen, "--jobs", jobs]
    return Part("compile", command, seconds, files=False, reports=True)


def _step(
    name: str, seconds: float, dry: bool, *variants: str, batch: str = "512", dropout: str = "0",
    more: Sequence[str] = (),
) -> Part:  # fmt: skip
    size = ["--device", "cuda", "--preset", "small", "--batch", batch]
    if dry:
        size = [*_TINY, "--warmup", "1", "--rounds", "1", "--steps-only"]
    command = ["benchmarks.bench_step", *size, *_variants(dry, *variants), "--dropout", dropout, *more]
    return Part(name, command, seconds)


def _variants(dry: bool, *names: str) -> list[str]:
    return ["--variants", *(name for name in names if not dry or name not in _ON_A_DEVICE)]
