"""Where the time of a step goes: forward and backward of its parts, for variants that run eagerly.

A mark is set where a part of the step begins: forward when its method is called, backward when the gradient
of what the method returned is complete. Parts run one after the other on one stream, so the time up to the
next mark is the part's, waits for the host included, and all parts add up to the step.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.floors import Ceilings, floor_seconds
from benchmarks.step_floor import step_passes
from benchmarks.step_variants import Setting, Trainee, synchronise

VARIANTS = ("released", "sdpa", "ours")
STUDENT = "student (masked + guidance)"  # ours runs both branches as one batch of rows
OTHER = "masks"  # forward, what no method is for: drawing and ranking the noise
_STEPS, _WARMUP = 5, 2

Part = tuple[str, str]  # name; "forward", "backward" or "step"


class Mark(NamedTuple):
    part: Part
    seconds: float
    event: torch.cuda.Event | None


class Marks:
    """Times at which parts begin."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, list[Mark]()

    def begin(self, name: str, direction: str) -> None:
        """From now on time is that of this part."""
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append(Mark((name, direction), time.perf_counter(), event))

    def milliseconds(self) -> dict[Part, float]:
        """Of each part; the last mark is the end."""
        synchronise(self._device)
        sums: dict[Part, float] = defaultdict(float)
        for first, second in zip(self._marks, self._marks[1:], strict=False):
            if first.event is None or second.event is None:
                sums[first.part] += (second.seconds - first.seconds) * 1e3
            else:
                sums[first.part] += first.event.elapsed_time(second.event)
        return sums


def _methods(variant: str, model: nn.Module) -> Iterator[tuple[Any, str, Callable[..., str]]]:
    """Owner and name of each method that is a part, and the part's name from its arguments."""
    yield model, "make_target", lambda *_: "teacher"
    yield model, "decode", lambda *_: "decoder"
    if variant == "ours":
        yield model, "encode_views", lambda *_: STUDENT
    else:
        encoder = model.model_maeenc
        yield encoder, "forward_encoder", lambda images, ids=None: "guidance" if ids is None else "masked"


@contextlib.contextmanager
def marked(variant: str, model: nn.Module, marks: Marks) -> Iterator[None]:
    """Inside, the model's parts set marks."""
    replaced = list(_methods(variant, model))
    for owner, name, part_of in replaced:
        setattr(owner, name, _marking(getattr(owner, name), part_of, marks))
    try:
        yield
    finally:
        for owner, name, _ in replaced:
            delattr(owner, name)


def _marking(method: Callable[..., Any], part_of: Callable[..., str], marks: Marks) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        part = part_of(*arguments)
        marks.begin(part, "forward")
        result = method(*arguments)
        marks.begin("loss" if part == "decoder" else OTHER, "forward")
        for tensor in result if isinstance(result, tuple) else (result,):
            # The gradient of a loss (0-d) is there long before those of the features beside it.
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.dim() > 0:
                tensor.register_hook(lambda _: marks.begin(part, "backward"))
        return result

    return run


def step_parts(variant: str, trainee: Trainee) -> dict[Part, float]:
    """Milliseconds of each part of a step; they add up to the step."""
    marks = Marks(trainee.device)
    batch = trainee.next_batch()
    synchronise(trainee.device)
    with marked(variant, trainee.model, marks):
        marks.begin(OTHER, "forward")
        loss = trainee.loss(*batch)
        marks.begin("loss", "backward")
        loss.backward()
        marks.begin("optimiser", "step")
        trainee.update()
        marks.begin("end", "step")
    return marks.milliseconds()


def measure_parts(variant: str, setting: Setting, ceilings: Ceilings | None) -> list[dict[str, Any]]:
    """A row a part and direction: its median over a few steps, and its floor where ceilings are known."""
    trainee = Trainee(variant, setting)
    steps = [step_parts(variant, trainee) for _ in range(_WARMUP + _STEPS)][_WARMUP:]
    rows = []
    for part in dict.fromkeys(part for step in steps for part in step):
        name, direction = part
        row: dict[str, Any] = dict(variant=variant, batch=setting.batch, part=name, direction=direction)
        row["dropout"] = setting.config.decoder_dropout
        row["milliseconds"] = statistics.median(step.get(part, 0.0) for step in steps)
        row["floor_milliseconds"] = None if ceilings is None else _floor(part, setting, ceilings)
        rows.append(row)
    return rows


def _floor(part: Part, setting: Setting, ceilings: Ceilings) -> float | None:
    name, direction = part
    passes = step_passes(setting.config, setting.batch, 2 if setting.low else 4)
    found = [
        passes[item] for item in (["masked", "guidance"] if name == STUDENT else [name]) if item in passes
    ]
    stages = [work for item in found for work in (item.backward if direction == "backward" else item.forward)]
    return floor_seconds(stages, ceilings) * 1e3 if stages else None
