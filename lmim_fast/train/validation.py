"""Reading of held-out sets during training: their scores, the best weights, and some wrong readings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lmim_fast.config import FinetuneConfig
from lmim_fast.data.normalize import comparison_of
from lmim_fast.errors import UsageError
from lmim_fast.evaluation.scoring import Readings, evaluate_store
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.models.recognizer_files import recognizer_bytes
from lmim_fast.train.checkpoint.files import write_file
from lmim_fast.train.recognizer_start import BEST
from lmim_fast.train.side_files import VALIDATION_FILE, WRONG_FILE, append, drop_lines_after, read_lines
from lmim_fast.train.start import open_records
from lmim_fast.train.world import World

_WRONG = 48  # readings that are kept for the report
_AT_ONCE = 256  # images of a batch


class Validation:
    """Measures the sets of `--val`; a call is made by every rank, at the same step.

    Readings are compared without case and symbols, of non-ASCII character sets as the Chinese benchmark does.

    Raises:
        UsageError: two sets have one name, or a path holds no labelled records.
    """

    def __init__(self, config: FinetuneConfig, world: World) -> None:
        self._config, self._world, self._run = config, world, Path(config.output)
        self._normalize = comparison_of(str(config.characters))
        self._sets: dict[str, Any] = {}
        for path in config.val:
            name = Path(path).resolve().name
            if name in self._sets:
                raise UsageError(f"--val: two sets are called {name}; rename a folder")
            store = open_records([path], config.loader.max_pixels, "--val")
            if not any(database.has_labels for database in store.databases):
                raise UsageError(f"--val {path}: no record has a label, so nothing can be scored")
            self._sets[name] = store

    def is_due(self, step: int, total: int) -> bool:
        """Whether the model is measured after `step` steps of `total`."""
        return step % self._config.validate_every == 0 or step == total

    def __call__(self, model: nn.Module, step: int) -> dict[str, Any]:
        """Read all sets, write their line, and keep the weights if they are the best so far.

        Returns:
            The line: step, mean accuracy over the sets (a share), and the scores of each set.
        """
        assert isinstance(model, Recognizer)
        config, sets, wrong = self._config, {}, []
        for name, store in self._sets.items():
            score, readings = evaluate_store(
                model,
                store,
                self._world,
                batch_size=min(config.batch_size, _AT_ONCE),
                precision=config.precision,
                threads=config.loader.threads,
                normalize=self._normalize,
            )
            sets[name] = {
                "images": score.images,
                "accuracy": score.accuracy / 100,
                "exact": score.exact_accuracy / 100,
                "ned": score.one_minus_ned / 100,
                "broken": score.broken,
                "unlabelled": score.unlabelled,
            }
            wrong += [{"set": name, **entry} for entry in _wrong(readings)]
        mean = sum(score["accuracy"] for score in sets.values()) / len(sets)
        line = {"step": step, "accuracy": mean, "sets": sets}
        with self._world.together():
            if self._world.is_main:
                self._keep(model, line, wrong)
        return line

    def _keep(self, model: Recognizer, line: dict[str, Any], wrong: list[dict[str, Any]]) -> None:
        path = self._run / VALIDATION_FILE
        drop_lines_after(path, line["step"] - 1)
        earlier = read_lines(path)
        append(path, [json.dumps(line)])
        wrong = sorted(wrong, key=lambda reading: -reading["probability"])[:_WRONG]
        write_file(self._run / WRONG_FILE, json.dumps({"step": line["step"], "wrong": wrong}).encode())
        if all(line["accuracy"] > other["accuracy"] for other in earlier):
            (self._run / BEST).parent.mkdir(exist_ok=True)
            write_file(self._run / BEST, recognizer_bytes(model, line["step"]))


def _wrong(readings: Readings) -> list[dict[str, Any]]:
    """The wrong readings that the model is surest of."""
    rows = [
        row for row in np.flatnonzero(~readings.correct) if int(readings.indices[row]) not in readings.broken
    ]
    rows.sort(key=lambda row: -float(readings.probabilities[row]))
    return [
        {
            "index": int(readings.indices[row]),
            "label": readings.labels[row],
            "reading": readings.strings[row],
            "probability": float(readings.probabilities[row]),
        }
        for row in rows[:_WRONG]
    ]
