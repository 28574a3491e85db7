"""CPU time of the host: for a training step, calls of layers, launches, preparing batches. No GPU.

    python -m benchmarks.bench_host [--only step calls launch data] [--rounds 40] [--data LMDB...]
                                    [--results FILE]

step   a step of ours and of the plain reference (`host_step.py`), kernels recorded, not run; what it asks for
       (`host_counts.py`). Times are of 17 tokens, where products cost little; counts are of 257, ViT-S's own.
       The reference's elementwise work and norms do run, a microsecond or two each beyond their dispatch.
calls  eager calls of single layers against PyTorch's (`host_calls.py`)
launch a launch through Triton's JIT and a direct one, on a driver that does nothing (`host_launch.py`)
data   a process's serial work on an image (`host_data.py`), on rendered words unless --data is passed

CPU time of one thread, so that a loaded machine disturbs little; forms take turns, and a ratio is the median
of the rounds' ratios. Needs Triton, without its interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import host_calls, host_counts, host_data, host_launch, host_step
from benchmarks.machine import describe, write_whole
from benchmarks.tables_host import host as render

SECTIONS = ("step", "calls", "launch", "data")
LAUNCHES = 200  # of kernels in a bf16 step at 257 tokens and 2 images; 12 more where grids are large
RATIO_LIMIT = 1.0  # of a step in bf16 to the reference
_ROUNDS = 40


def measure(
    sections: tuple[str, ...] = SECTIONS, rounds: int = _ROUNDS, paths: tuple[str, ...] = (), batch: int = 256
) -> dict[str, Any]:
    """The result with these sections, JSON-ready.

    Args:
        sections: of `SECTIONS`.
        rounds:   of steps, and batches of data; calls of layers get a fourth, of 200 calls each, and so do
                  launches, of 1000 each.
        paths:    LMDB folders; none: rendered words.
        batch:    images of a batch of data.
    """
    result = {"benchmark": "host", **describe(torch.device("cpu"))}
    if "step" in sections:
        tokens = {
            name: host_step.config(size).num_patches + 1
            for name, size in (("timed", host_step.TIMED), ("counted", host_step.COUNTED))
        }
        rows = [
            host_step.measure(precision, rounds) | host_counts.measure(precision)
            for precision in host_step.PRECISIONS
        ]
        result["step"] = {"tokens": tokens, "rows": rows}
    if "calls" in sections:
        result["calls"] = {
            "shape": host_calls.SHAPE,
            "rows": host_calls.measure(max(1, rounds // 4), calls=200),
        }
    if "launch" in sections:
        result["launch"] = host_launch.measure(max(1, rounds // 4))
    if "data" in sections:
        result["data"] = host_data.measure(paths, batch, rounds)
    return result


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.process_time)
def test_host_step(benchmark: Any, one_thread: None) -> None:
    form = host_step.Form("ours", "bf16", host_step.config(host_step.TIMED))
    benchmark.pedantic(form.step, rounds=20, warmup_rounds=3)
    counted = host_counts.launches(host_step.Form("ours", "bf16", host_step.config(host_step.COUNTED)))
    launches = sum(sum(kernels.values()) for kernels in counted.values())
    ratio = host_step.measure("bf16", rounds=20)["ratio"]["step"]
    benchmark.extra_info.update(launches=launches, ratio=ratio)
    assert launches <= LAUNCHES, f"{launches} kernels a step: {counted}"
    assert ratio <= RATIO_LIMIT, f"a step takes {ratio:.2f}x the host time of the reference's"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--data", nargs="+", default=(), help="LMDB folders, or folders that hold some")
    parser.add_argument("--batch", type=int, default=256, help="images of a batch of data")
    parser.add_argument("--results", type=Path, help="write the result into this JSON file")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.batch < 1:
        parser.error(f"need a round and an image at least, got --rounds {args.rounds} --batch {args.batch}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the times would be the interpreter's")
    torch.set_num_threads(1)
    result = measure(tuple(args.only), args.rounds, tuple(args.data), args.batch)
    print(render(result))
    if args.results:
        write_whole(args.results, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
