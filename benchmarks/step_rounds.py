"""Variants of a step side by side in one process: prepared one after the other, then timed in rounds.

Rounds alternate between the variants, so that clocks and noise hit all alike. A row is filed when a variant
has run at all ("preliminary" until its first common round), and again after every round.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from benchmarks import step_parts
from benchmarks.floors import Ceilings
from benchmarks.machine import Record
from benchmarks.step_floor import step_seconds
from benchmarks.step_memory import peak_bytes
from benchmarks.step_variants import Prepared, Search, Setting, prepare, synchronise

STEPS = {"cuda": 5, "cpu": 1}  # of a turn; on CUDA they follow each other without a wait, as in training
_PRODUCTS = 3  # of a round
_LAST = ("compiled", "ours+compile")  # prepared last: they take long, and the first resets the compiler
T = TypeVar("T")


@dataclass
class Lane:
    """A variant that is prepared. `peak`: bytes, see `Comparison`; `milliseconds`: of a step in each turn."""

    variant: str
    setting: Setting
    prepared: Prepared
    peak: int | None
    milliseconds: list[float] = field(default_factory=list)
    preliminary: bool = True


@dataclass
class Comparison:
    """Variants side by side on one setting after another, into `rows`, `failed` and `parts` of a record.

    Peak memory on a CUDA device is the growth over what was allocated before the variant was built: its
    weights, its optimiser state and a step; of graphs, whose replays allocate nothing, the steps before the
    capture. On a CPU it is measured in another process, after the rounds.

    Args:
        record:   the result; on a CPU `gemm_flops` of it is the median rate of the products.
        variants: names in the order of a round.
        settings: the most important first.
        warmup:   turns of each variant when it is prepared; the last one makes a preliminary row.
        rounds:   rounds that count.
        search:   how "compiled" is compiled.
        flops:    FLOPs of a step for an image, for the share of the rate of products.
        parts:    measure the parts of a step too.
        ceilings: of the device, where the floor of a step is known.
        products: side of square products whose rate on a CPU is measured in every round too, since a shared
                  machine changes within seconds.
        memory:   measure peak memory on a CPU too.
    """

    record: Record
    variants: Sequence[str]
    settings: Sequence[Setting]
    warmup: int
    rounds: int
    search: Search
    flops: float
    parts: bool = False
    ceilings: Ceilings | None = None
    products: int | None = None
    memory: bool = True

    def run(self) -> None:
        """Measure steps, then parts.

        Raises:
            torch.AcceleratorError: a variant broke the device; it is filed.
        """
        for setting in self.settings:
            self._compare(setting)
        for setting in self.settings if self.parts else ():
            for variant in [name for name in self.variants if name in step_parts.VARIANTS]:
                measure = partial(step_parts.measure_parts, variant, setting, self.ceilings)
                self.record.result["parts"] += self._try(variant, setting, measure) or []
                self.record.write()

    def _compare(self, setting: Setting) -> None:
        lanes: dict[str, Lane] = {}
        rates: list[float] = []
        earlier = list(self.record.result["rows"])

        def file() -> None:
            timed = [lanes[name] for name in self.variants if name in lanes and lanes[name].milliseconds]
            self.record.result["rows"] = earlier + [self._row(lane, rates) for lane in timed]
            self.record.write()

        for variant in sorted(self.variants, key=lambda name: name in _LAST and 1 + _LAST.index(name)):
            lane = self._try(variant, setting, partial(self._prepare, variant, setting))
            if lane is not None:
                lanes[variant] = lane
                file()
        multiply = _products(self.products, setting) if self.products else None
        for number in range(self.rounds):
            for name in [name for name in self.variants if name in lanes]:
                lane = lanes[name]
                milliseconds = self._try(name, setting, partial(_turn, lane))
                if milliseconds is None:
                    del lanes[name]
                    continue
                lane.milliseconds = [*(lane.milliseconds if number else ()), milliseconds]
                lane.preliminary = False
            if multiply is not None:
                rates.append(multiply())
                self.record.result.setdefault("gemm_rounds", []).append(rates[-1])
                self.record.result["gemm_flops"] = statistics.median(self.record.result["gemm_rounds"])
            file()
        for name, lane in lanes.items():
            if setting.device == "cpu" and self.memory:
                lane.peak = self._try(name, setting, partial(peak_bytes, name, setting, lane.prepared.chosen))
                file()

    def _prepare(self, variant: str, setting: Setting) -> Lane:
        gc.collect()  # of a variant that failed
        if setting.device == "cpu":
            lane = Lane(variant, setting, prepare(variant, setting, self.search), None)
        else:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            prepared = prepare(variant, setting, self.search)
            if not prepared.captured:
                torch.cuda.reset_peak_memory_stats()
            prepared.run()
            lane = Lane(variant, setting, prepared, torch.cuda.max_memory_allocated() - before)
        for _ in range(self.warmup):
            lane.milliseconds = [_turn(lane)]
        return lane

    def _try(self, variant: str, setting: Setting, call: Callable[[], T]) -> T | None:
        """What the call gives; None if it fails, which is filed."""
        try:
            return call()
        except Exception as error:  # compilers, backends and allocators raise whatever they like
            lines = str(error).strip().splitlines() or [""]
            message = f"{type(error).__name__}: {lines[0][:300]}"
            about = {"variant": variant, "batch": setting.batch, "dropout": setting.config.decoder_dropout}
            self.record.fail(message, **about)
            print(f"{variant}, batch {setting.batch}: {message}", file=sys.stderr, flush=True)
            if isinstance(error, torch.AcceleratorError):  # whatever followed would fail
                raise
            return None

    def _row(self, lane: Lane, rates: list[float]) -> dict[str, Any]:
        setting, milliseconds = lane.setting, statistics.median(lane.milliseconds)
        rate = setting.batch / milliseconds * 1e3
        row: dict[str, Any] = {"variant": lane.variant, "batch": setting.batch}
        row |= {"dropout": setting.config.decoder_dropout, "images_per_second": rate}
        row |= {"milliseconds": lane.milliseconds, "peak_memory": lane.peak, "share_of_floor": None}
        row |= {"gemm_flops": statistics.median(rates)} if rates else {}
        gemm = row.get("gemm_flops", self.record.result.get("gemm_flops"))
        row["mfu"] = None if gemm is None else rate * self.flops / gemm
        if self.ceilings is not None:
            floor = step_seconds(setting.config, setting.batch, 2 if setting.low else 4, self.ceilings)
            row["share_of_floor"] = floor * 1e3 / milliseconds
        if lane.prepared.chosen is not None:
            row |= {"chosen": asdict(lane.prepared.chosen), "searched": lane.prepared.searched}
        return row | ({"preliminary": True} if lane.preliminary else {})


def _turn(lane: Lane) -> float:
    """Milliseconds of a step; on CUDA after one that does not count: another variant ran before."""
    place, count = torch.device(lane.setting.device), STEPS[lane.setting.device]
    if place.type == "cuda":
        lane.prepared.run()
    synchronise(place)
    start = time.perf_counter()
    for _ in range(count):
        lane.prepared.run()
    synchronise(place)
    return (time.perf_counter() - start) * 1e3 / count


def _products(size: int, setting: Setting) -> Callable[[], float]:
    """Measures FLOP/s of the CPU in square products."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16 if setting.low else torch.float32) for _ in range(2))
    torch.mm(a, b)

    def rate() -> float:
        start = time.perf_counter()
        for _ in range(_PRODUCTS):
            torch.mm(a, b)
        return _PRODUCTS * 2 * size**3 / (time.perf_counter() - start)

    return rate
