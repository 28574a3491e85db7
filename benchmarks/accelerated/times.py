"""CPU time of a third-party model before and after `accelerate`, where nothing is asked for: never slower."""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.accelerated.models import SIZES, Subject, subject
from benchmarks.turns import cpu_microseconds, in_turn
from lmim_fast import accelerate

LIMIT = 0.98  # least time of the model before to that after
DIRECTIONS = ("forward", "both")
_MICROSECONDS = 20_000  # of a form in a round
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
            form: runner(Subject(model, made.inputs, made.options), direction)
            for form, model in models.items()
        }
        row = _rounds(runs, rounds)
        if row["ratio"] < LIMIT:
            row = _rounds(runs, _RETRY * rounds)
        rows.append({"size": size_name, "direction": direction, **row})
    return rows


def _rounds(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, Any]:
    calls = max(1, round(_MICROSECONDS / min(_warm(runs["before"], 1) for _ in range(3))))
    times = in_turn({form: functools.partial(_warm, run, calls) for form, run in runs.items()}, rounds)
    ratios = {form: ratio(times["before"], times[form]) for form in ("after", "same")}
    microseconds = {form: [round(spent, 1) for spent in found] for form, found in times.items()}
    return {"microseconds": microseconds, "ratio": ratios["after"], "noise": ratios["same"]}


def ratio(before: list[float], after: list[float]) -> float:
    """The median of the rounds' before / after."""
    return statistics.median(a / b for a, b in zip(before, after, strict=True))


def runner(
    each: Subject, direction: str, context: Callable[[], Any] = contextlib.nullcontext
) -> Callable[[], None]:
    """A call of the model ("forward", without gradients), or a forward and a backward pass ("both").

    Args:
        context: what the model is called in.
    """

    def forward() -> None:
        with torch.no_grad(), context():
            each()

    def both() -> None:
        with context():
            trained = [out for out in each() if out.requires_grad]
        torch.autograd.backward(trained, [torch.ones_like(out) for out in trained])
        each.model.zero_grad()

    return both if direction == "both" else forward


def _warm(run: Callable[[], None], calls: int) -> float:
    """Microseconds of a call, after one that is not timed: who ran before leaves the caches warm."""
    run()
    return cpu_microseconds(run, calls)
