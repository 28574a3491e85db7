"""Tiny runs for the pre-training tests: an LMDB of drawn words, a small model, the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np

# One thread: bitwise comparisons need the same reduction order, and two cores have other work.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}
SMALL_MODEL = [
    *("--model.width", "32", "--model.depth", "1", "--model.heads", "2"),
    *("--model.decoder-width", "32", "--model.decoder-depth", "1", "--model.decoder-heads", "2"),
    *("--model.decoder-ffn", "64", "--model.mae-decoder-depth", "1"),
]
REPEATABLE = ("step", "epoch", "lr", "grad_norm", "skipped_steps")  # and every loss


def drawn_word(number: int) -> bytes:
    """A PNG of a word on a plain ground."""
    draw = np.random.default_rng(number)
    height, width = int(draw.integers(24, 48)), int(draw.integers(60, 160))
    image = np.full((height, width, 3), draw.integers(150, 256, 3), np.uint8)
    text = "".join(chr(code) for code in draw.integers(97, 123, 5))
    cv2.putText(
        image, text, (4, height - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.8, draw.integers(0, 90, 3).tolist(), 2
    )
    return cv2.imencode(".png", image)[1].tobytes()


def write_lmdb(folder: Path, count: int, *, broken: tuple[int, ...] = (), claimed: int | None = None) -> Path:
    """An LMDB of `count` drawn words; the 1-based numbers in `broken` hold cut files."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for number in range(1, count + 1):
            image = drawn_word(number)
            transaction.put(b"image-%09d" % number, image[:40] if number in broken else image)
        transaction.put(b"num-samples", str(count if claimed is None else claimed).encode())
    return folder


def options(data: Path, output: Path, *more: str, objective: str = "mae", steps: int = 12) -> list[str]:
    """Options of a run of a few seconds; the last of a repeated option wins."""
    return [
        *("--data", str(data), "--output", str(output), "--objective", objective, "--preset", "tiny"),
        *("--steps", str(steps), "--batch-size", "8", "--log-every", "1", "--checkpoint-every", "4"),
        *("--optim.lr", "1e-3", "--optim.warmup-steps", "2", "--device", "cpu", "--loader.threads", "1"),
        *SMALL_MODEL,
        *more,
    ]


def start(arguments: list[str], *, processes: int | None = None, **settings: Any) -> subprocess.Popen[str]:
    """`python -m lmim_fast.pretrain`, or torchrun with that many processes."""
    launcher = [sys.executable, "-m"]
    if processes is not None:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.Popen(
        [*launcher, "lmim_fast.pretrain", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def launch(arguments: list[str], *, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    process = start(arguments, processes=processes)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[dict[str, Any]]:
    """The fields of metrics.jsonl that may not depend on when and where a run was made."""
    return [
        {name: line[name] for name in line if name in REPEATABLE or name.startswith("loss")}
        for line in lines(run)
    ]


def weights_of(run: Path, step: int) -> bytes:
    """Bytes of a checkpoint's weights and optimiser."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return (folder / "model.safetensors").read_bytes() + (folder / "optimizer.safetensors").read_bytes()
