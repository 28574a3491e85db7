"""Milliseconds of a third-party model on a CUDA device: as it is, accelerated, compiled, and both."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.accelerated.models import SIZES, Subject, subject
from benchmarks.accelerated.times import ratio, runner
from benchmarks.turns import in_turn
from lmim_fast import accelerate

FORMS = ("before", "after", "compiled", "accelerated, compiled")
_CALLS = 5  # of a form in a round


def measure(name: str, rounds: int, size: str = "device", device: str = "cuda") -> list[dict[str, Any]]:
    """A row a direction: milliseconds a call of each form in each round, in bf16 by autocast.

    Forms take turns.

    Args:
        name: of `MODELS`.
        size: of `SIZES`.
    Returns:
        "direction" is forward (evaluation, no gradients) or both (training); "ratio" of each form: how many
        times as fast as "before", the median of the rounds.
    Raises:
        ImportError: the library is not installed.
    """
    made = subject(name, SIZES[size], random=True)
    model = made.model.to(device)
    inputs = tuple(each.to(device) for each in made.inputs)
    models = {form: copy.deepcopy(model) for form in FORMS}
    accelerate(models["after"])
    accelerate(models["accelerated, compiled"])
    autocast = functools.partial(torch.autocast, device, torch.bfloat16)
    rows = []
    for direction in ("forward", "both"):
        runs = {}
        for form, each in models.items():
            each.train(direction == "both")
            called: Any = torch.compile(each) if "compiled" in form else each
            runs[form] = runner(Subject(called, inputs, made.options), direction, autocast)
        timed = {form: functools.partial(_milliseconds, run, device) for form, run in runs.items()}
        times = in_turn(timed, rounds)  # the round that does not count compiles
        ratios = {form: ratio(times["before"], spent) for form, spent in times.items()}
        rows.append(dict(size=size, direction=direction, milliseconds=times, ratio=ratios))
    return rows


def _milliseconds(run: Callable[[], None], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(_CALLS):
        run()
    _wait(device)
    return 1e3 * (time.perf_counter() - start) / _CALLS


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
