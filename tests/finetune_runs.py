"""Tiny fine-tuning runs: LMDBs of drawn words with labels, a small recogniser, the real command line."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import warm

from lmim_fast import cli
from lmim_fast.train.telemetry import Telemetry

SMALL_READER = [
    *("--model.encoder.width", "32", "--model.encoder.depth", "1", "--model.encoder.heads", "1"),
    *("--model.encoder.patch-size", "8", "--model.encoder.pos-grid", "true"),
    *("--model.decoder-width", "32", "--model.decoder-depth", "1", "--model.decoder-heads", "1"),
    *("--model.decoder-head-dim", "32", "--model.decoder-ffn", "32", "--model.max-length", "8"),
]
WORDS = ["cat", "Dog", "r2d2", "No.5", "x", "seven", "a-b", "OPEN", "42", "end"]


def drawn(word: str, number: int) -> bytes:
    """A PNG of the word on a plain ground."""
    draw = np.random.default_rng(number)
    height, width = int(draw.integers(28, 40)), 30 + 18 * max(1, len(word))
    image = np.full((height, width, 3), draw.integers(150, 256, 3), np.uint8)
    color = draw.integers(0, 90, 3).tolist()
    cv2.putText(image, word, (6, height - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.8, color, 2)
    return cv2.imencode(".png", image)[1].tobytes()


def write_words(
    folder: Path, count: int, *, words: Sequence[str | None] = WORDS, broken: tuple[int, ...] = ()
) -> Path:
    """An LMDB of `count` drawn words with labels, None for none; the numbers in `broken` hold cut files."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for number in range(1, count + 1):
            word = words[number % len(words)]
            image = drawn(word or "none", number)
            transaction.put(b"image-%09d" % number, image[:40] if number in broken else image)
            if word is not None:
                transaction.put(b"label-%09d" % number, word.encode())
        transaction.put(b"num-samples", str(count).encode())
    return folder


def options(data: Path, output: Path, *more: str, steps: int = 12) -> list[str]:
    """Options of a run of a few seconds; the last of a repeated option wins."""
    return [
        *("--data", str(data), "--output", str(output), "--preset", "tiny", "--steps", str(steps)),
        *("--batch-size", "8", "--log-every", "1", "--checkpoint-every", "4", "--device", "cpu"),
        *("--optim.lr", "1e-3", "--optim.warmup-steps", "2", "--loader.threads", "1"),
        *SMALL_READER,
        *more,
    ]


def validation(run: Path) -> list[dict[str, Any]]:
    """validation.jsonl."""
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


def files(run: Path) -> set[str]:
    """Names of files in a run folder, outside checkpoints and tensorboard."""
    return {
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file() and path.relative_to(run).parts[0] not in ("checkpoints", "tensorboard")
    }


def _killed(step: int, arguments: Sequence[str]) -> int:
    def advance(self: Telemetry, done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Telemetry.advance = advance  # type: ignore[method-assign]
    return cli.main(["finetune", *arguments])


def kill_at(step: int, arguments: Sequence[str]) -> None:
    """Run until that step is done, then kill -9."""
    done = warm.Program(_killed, step, arguments).wait()
    assert done.returncode == -signal.SIGKILL, done.stderr


__all__ = ["WORDS", "drawn", "files", "kill_at", "options", "validation", "write_words"]
