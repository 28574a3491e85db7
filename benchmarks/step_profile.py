"""Where the device's time of a step goes, kernel by kernel, and how busy host and device are.

    python -m benchmarks.step_profile [--device cuda] [--batch 512] [--variants ours ours+graph]
                                      [--steps 3] [--results FILE]

Times of a step are taken without the profiler; calls and microseconds of kernels come from torch.profiler. On
a CPU operators stand for kernels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import Record
from benchmarks.step_variants import CUDA_ONLY, VARIANTS, Setting, prepare, search_of, synchronise
from lmim_fast.config import preset

_NOT_KERNELS = ("ProfilerStep", "Optimizer.")  # ranges that PyTorch annotates on the device
_SHOWN = 15


class Span(NamedTuple):
    """Work on the device: microseconds from `start` to `end`, `own` of them not in a span within it."""

    name: str
    start: float
    end: float
    own: float


def spans_of(events: Iterable[Any], device: torch.device) -> list[Span]:
    """Kernels and copies of a profile; on a CPU, operators."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    found = []
    for event in events:
        annotated = getattr(event, "is_user_annotation", False) or event.name.startswith(_NOT_KERNELS)
        if event.device_type != kind or annotated:
            continue
        start, end = event.time_range.start, event.time_range.end
        own = end - start if device.type == "cuda" else event.self_cpu_time_total
        found.append(Span(event.name, start, end, own))
    return found


def busy(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one span goes on."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def table(spans: Sequence[Span], steps: int) -> list[dict[str, Any]]:
    """A row a kernel: calls and microseconds of a step, share of all; the most expensive first."""
    calls: dict[str, int] = defaultdict(int)
    microseconds: dict[str, float] = defaultdict(float)
    for span in spans:
        calls[span.name] += 1
        microseconds[span.name] += span.own
    total = sum(microseconds.values()) or 1.0
    order = sorted(microseconds, key=lambda name: -microseconds[name])
    return [
        dict(
            kernel=name,
            calls=calls[name] / steps,
            microseconds=microseconds[name] / steps,
            share=microseconds[name] / total,
        )
        for name in order
    ]


def timed(run: Callable[[], None], device: torch.device, steps: int) -> dict[str, float]:
    """Milliseconds of a step: `wall`; `host`, until its last launch has returned; `cpu`, of all threads."""
    synchronise(device)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        run()
    launched = time.perf_counter()
    synchronise(device)
    ended = time.perf_counter()
    used = time.process_time() - cpu
    seconds = {"wall": ended - start, "host": launched - start, "cpu": used}
    return {name: value / steps * 1e3 for name, value in seconds.items()}


def measure(variant: str, setting: Setting, steps: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Totals of a step, and its table.

    Idle time of the device is what is left of the wall time of a step without the profiler: launches take
    longer under it, kernels do not.

    Raises:
        RuntimeError: the profiler saw nothing.
    """
    device = torch.device(setting.device)
    prepared = prepare(variant, setting, search_of(setting.device, None))
    timed(prepared.run, device, steps)
    milliseconds = timed(prepared.run, device, steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            prepared.run()
        synchronise(device)
    spans = spans_of(profiler.events(), device)
    if not spans:
        raise RuntimeError("the profiler saw no work on the device: may this user read its counters?")
    device_busy = busy(spans) / steps / 1e3
    totals: dict[str, Any] = {f"{name}_milliseconds": value for name, value in milliseconds.items()}
    totals |= dict(variant=variant, batch=setting.batch, busy_milliseconds=device_busy)
    totals["idle_share"] = max(0.0, 1 - device_busy / milliseconds["wall"])
    totals["host_busy_share"] = milliseconds["host"] / milliseconds["wall"]
    totals["launches"] = len(spans) / steps
    return totals, [dict(variant=variant) | row for row in table(spans, steps)]


def headline(totals: dict[str, Any]) -> str:
    """How busy device and host are."""
    return (
        f"{totals['variant']}: {totals['wall_milliseconds']:.1f} ms, device idle {totals['idle_share']:.0%}, "
        f"host busy {totals['host_busy_share']:.0%}, {totals['launches']:.0f} launches"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--preset", choices=["tiny", "small", "base"], default="small")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="that are timed, and as many are profiled")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["ours"])
    parser.add_argument("--results", type=Path, help="JSON file, written after each variant")
    args = parser.parse_args(argv)
    if args.device != "cuda" and (refused := [name for name in args.variants if name in CUDA_ONLY]):
        parser.error(f"{refused[0]} needs a CUDA device")
    device, low = torch.device(args.device), args.device == "cuda"
    config = preset(args.preset, decoder_dropout=args.dropout, residual="bf16" if low else "fp32")
    setting = Setting(config, args.batch, args.device, low)
    record = Record(args.results, "profile", device, preset=args.preset, dropout=args.dropout, totals=[])
    for variant in args.variants:
        try:
            totals, rows = measure(variant, setting, args.steps)
        except Exception as error:  # whatever a capture or a profiler raises
            record.fail(f"{type(error).__name__}: {str(error).strip()[:300]}", variant=variant)
            continue
        record.result["totals"].append(totals)
        record.result["rows"] += rows
        record.result["headline"] = "; ".join(map(headline, record.result["totals"]))
        record.write()
        print(headline(totals))
        for row in rows[:_SHOWN]:
            figures = f"{row['share']:6.1%} {row['microseconds']:10.1f} us {row['calls']:7.1f} x"
            print(f"{figures}  {row['kernel'][:80]}")
    return record.end()


if __name__ == "__main__":
    sys.exit(main())
