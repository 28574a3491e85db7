"""Runs the processes of all variants in alternating rounds, and makes rows of what they tell."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks import step_parts
from benchmarks.floors import Ceilings
from benchmarks.step_floor import step_seconds
from benchmarks.step_variants import Candidate, Setting, candidates
from benchmarks.step_workers import (
    Request,
    VariantFailed,
    Worker,
    measure_memory,
    serve_parts,
    serve_products,
    serve_steps,
)

_COMPILED = ("compiled", "ours+compile")


@dataclass
class _Lane:
    """A variant on a setting, in its process; after an order that failed, `error` says why."""

    request: Request
    worker: Worker
    prepared: tuple[Candidate | None, list[dict[str, Any]]] | None = None
    milliseconds: list[float] = field(default_factory=list)
    error: str | None = None

    def send(self, order: str) -> None:
        """Give an order, whose answer `receive` gets."""
        if self.error is None:
            try:
                self.worker.send(order)
            except VariantFailed as error:
                self.error = str(error)

    def receive(self) -> Any:
        """The answer, or None."""
        if self.error is None:
            try:
                return self.worker.receive()
            except VariantFailed as error:
                self.error = str(error)
        return None

    def ask(self, order: str) -> Any:
        """Give an order; the answer, or None."""
        self.send(order)
        return self.receive()


class Comparison:
    """Variants side by side on one setting after another.

    `rows`, `parts`, `failed` and `product_rates` are JSON-ready, and hold what is measured by then. Where the
    run is interrupted, rows of the rounds until then have no peak memory.

    Args:
        variants: names in the order of a round.
        settings: the most important first.
        warmup:   rounds that do not count.
        rounds:   rounds that do.
        search:   "compiled" tries all its candidates.
        parts:    measure the parts of a step too.
        ceilings: of the device, where the floor of a step is known.
        products: side of square products whose rate on a CPU is measured in every round too, since a shared
                  machine changes within seconds: `product_rates` (FLOP/s) of the rounds that count.
    """

    def __init__(
        self,
        variants: Sequence[str],
        settings: Sequence[Setting],
        *,
        warmup: int,
        rounds: int,
        search: bool = False,
        parts: bool = False,
        ceilings: Ceilings | None = None,
        products: int | None = None,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.parts: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.product_rates: list[float] = []
        self._products = products
        self._variants, self._settings = variants, settings
        self._warmup, self._rounds = warmup, rounds
        self._search, self._parts, self._ceilings = search, parts, ceilings

    def run(self) -> None:
        """Measure steps, then parts. What is compiled is compiled first, for all settings at once."""
        early = {
            (variant, setting): self._lane(variant, setting)
            for setting in self._settings
            for variant in self._variants
            if variant in _COMPILED
        }
        for lane in early.values():
            lane.send("prepare")
        for lane in early.values():
            lane.prepared = lane.receive()
        for setting in self._settings:
            lanes = [early.get((name, setting)) or self._lane(name, setting) for name in self._variants]
            self._compare(lanes)
        for setting in self._settings if self._parts else ():
            self._measure_parts(setting)

    def _lane(self, variant: str, setting: Setting) -> _Lane:
        request = Request(variant, setting, candidates(setting.device, self._search), self._search)
        return _Lane(request, Worker(serve_steps, request))

    def _compare(self, lanes: list[_Lane]) -> None:
        """Rounds of one setting; processes end with it, and give their memory back."""
        for lane in lanes:  # one after the other: their first steps together might not fit
            if lane.prepared is None:
                lane.prepared = lane.ask("prepare")
        rates: list[float] = []
        try:
            self._alternate(lanes, rates)
        except KeyboardInterrupt:  # what is measured counts; no order is given to processes amid another one
            for lane in lanes:
                if lane.error is None and lane.milliseconds:
                    self.rows.append(self._row(lane, None, rates))
            raise
        finally:
            self.product_rates += rates
        for lane in lanes:
            memory = self._memory(lane)
            if lane.error is None:
                self.rows.append(self._row(lane, memory, rates))
            else:
                self._note(lane.request.variant, lane.request.setting, lane.error)
            lane.worker.end()

    def _alternate(self, lanes: list[_Lane], rates: list[float]) -> None:
        """All rounds; the times go to the lanes, the rates of products into `rates`."""
        products = self._serve_products(lanes[0].request.setting)
        for number in range(self._warmup + self._rounds):
            for lane in lanes:
                milliseconds = lane.ask("turn")
                if milliseconds is not None and number >= self._warmup:
                    lane.milliseconds.append(milliseconds)
            rate = None
            if products:
                try:
                    rate = products.ask("turn")
                except VariantFailed as error:
                    self._note("products", lanes[0].request.setting, str(error))
                    products.end()
                    products = None
            if rate is not None and number >= self._warmup:
                rates.append(rate)
        if products:
            products.end()

    def _serve_products(self, setting: Setting) -> Worker | None:
        dtype = torch.bfloat16 if setting.low else torch.float32
        return Worker(serve_products, self._products, dtype) if self._products else None

    def _memory(self, lane: _Lane) -> int | None:
        """Peak bytes: on CUDA the process's own, on a CPU those of another one."""
        if lane.request.setting.device == "cuda" or lane.error is not None:
            return lane.ask("memory")
        assert lane.prepared is not None
        chosen, _ = lane.prepared
        try:
            return measure_memory(lane.request._replace(tries=[chosen] if chosen else [], search=False))
        except VariantFailed as error:
            lane.error = f"memory: {error}"
            return None

    def _row(self, lane: _Lane, memory: int | None, rates: list[float]) -> dict[str, Any]:
        setting, milliseconds = lane.request.setting, statistics.median(lane.milliseconds)
        row: dict[str, Any] = self._about(lane.request.variant, setting)
        row |= {
            "images_per_second": setting.batch / milliseconds * 1e3,
            "milliseconds": lane.milliseconds,
            "peak_memory": memory,
            "share_of_floor": None,
        }
        if rates:
            row["gemm_flops"] = statistics.median(rates)
        if self._ceilings is not None:
            itemsize = 2 if setting.low else 4
            floor = step_seconds(setting.config, setting.batch, itemsize, self._ceilings)
            row["share_of_floor"] = floor * 1e3 / milliseconds
        assert lane.prepared is not None
        chosen, searched = lane.prepared
        if chosen is not None:
            row |= {"chosen": asdict(chosen), "searched": searched}
        return row

    def _about(self, variant: str, setting: Setting) -> dict[str, Any]:
        return {"variant": variant, "batch": setting.batch, "dropout": setting.config.decoder_dropout}

    def _note(self, variant: str, setting: Setting, error: str) -> None:
        self.failed.append(self._about(variant, setting) | {"error": error})
        print(f"{variant}, batch {setting.batch}: {error}", file=sys.stderr, flush=True)

    def _measure_parts(self, setting: Setting) -> None:
        for variant in self._variants:
            if variant not in step_parts.VARIANTS:
                continue
            worker = Worker(serve_parts, variant, setting, self._ceilings)
            try:
                self.parts += worker.ask("parts")
            except VariantFailed as error:
                self._note(variant, setting, f"parts: {error}")
            worker.end()
