"""CPU time of a third-party model before and after `accelerate`, where nothing is asked for: never slower."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.accelerated.models import SIZES, Subject, subject
from lmim_fast import accelerate

LIMIT = 0.98  # least time of the model before to that after
DIRECTIONS = ("forward", "both")
_SECONDS = 0.02  # of a form in a round
_RETRY = 4  # times as many rounds, if a ratio is below the limit


def measure(name: str, size_name: str, rounds: int) -> list[dict[str, Any]]:
    """A row a direction: microseconds a call of each form in each round, and medians of the rounds' ratios.

    "before" and "same" are two copies of the model as it is, "after" is accelerated; forms take turns, on one
    thread. "forward" is in evaluation without gradients; "both" is a forward and a backward pass in training,
    with the model's own dropout and drop path.

    Args:
        name:      of `MODELS`.
        size_name: of `SIZES`.
        rounds:    four times as many where a ratio is below `LIMIT`, and that figure stands.
    Returns:
        "ratio" is before / after, "noise" before / same.
    Raises:
        ImportError: the library is not installed.
    """
    made = subject(name, SIZES[size_name], random=True)
    models = {"before": made.model, "after": copy.deepcopy(made.model), "same": copy.deepcopy(made.model)}
    accelerate(models["after"])
    rows = []
    for direction in DIRECTIONS:
        for model in models.values():
            model.train(direction == "both")
        runs = {
            form: _runner(Subject(model, made.inputs, made.options), direction)
            for form, model in models.items()
        }
        row = _rounds(runs, rounds)
        if row["ratio"] < LIMIT:
            row = _rounds(runs, _RETRY * rounds)
        rows.append({"size": size_name, "direction": direction, **row})
    return rows


def _rounds(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, Any]:
    calls = max(1, round(_SECONDS / min(_seconds(runs["before"], 1) for _ in range(3))))
    times: dict[str, list[float]] = {form: [] for form in runs}
    for number in range(rounds + 1):
        for form in list(runs)[:: 1 if number % 2 else -1]:
            spent = _seconds(runs[form], calls)
            if number:  # the first is a warm-up
                times[form].append(spent)
    ratios = {
        form: statistics.median(a / b for a, b in zip(times["before"], times[form], strict=True))
        for form in ("after", "same")
    }
    microseconds = {form: [round(1e6 * spent, 1) for spent in found] for form, found in times.items()}
    return {"microseconds": microseconds, "ratio": ratios["after"], "noise": ratios["same"]}


def _runner(each: Subject, direction: str) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            each()

    def both() -> None:
        trained = [out for out in each() if out.requires_grad]
        torch.autograd.backward(trained, [torch.ones_like(out) for out in trained])
        each.model.zero_grad()

    return both if direction == "both" else forward


def _seconds(run: Callable[[], None], calls: int) -> float:
    """Of a call, after one that is not timed: who ran before leaves the caches warm."""
    run()
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls
