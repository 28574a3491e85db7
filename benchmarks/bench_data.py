"""Images per second of the input pipeline, stage by stage, on a user's own LMDBs.

    python -m benchmarks.bench_data --data PATH... [--batch 256] [--seconds 10] [--threads 2] [--json FILE]
                                    [--imgaug-python PYTHON]

The stages of DALI grow by one operator at a time on batches that are already in memory. All run on a GPU; on
a CPU the pipeline has the first alone, and C++ for the others where that is built. "whole pipeline" is
`ViewPipeline` as training uses it: reading, header checks, programs, both views, and the photometric op.
CPU us is the process's CPU time an image, of all its threads. "Released manner" is one image after the other
in one process, on one core: `released_views`, and with `--imgaug-python` also `released_imgaug`, run by an
interpreter that has imgaug. The end compares a core of the whole pipeline with a core of theirs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import torch

from benchmarks import released_imgaug
from benchmarks.machine import describe
from benchmarks.released_views import ReleasedViews
from lmim_fast.config import DataConfig, GuidanceConfig
from lmim_fast.data.dali import DaliViews, Stage, build_pipeline, feed
from lmim_fast.data.guidance.parameters import sample_parameters
from lmim_fast.data.guidance.program import GuidanceProgram, make_program
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.data.store.probe import Status, probe
from lmim_fast.data.store.records import RecordStore
from lmim_fast.ops.photometric import photometric

_MEMORY_BATCHES = 8  # different batches that the DALI stages take turns with
_ENDLESS = 10**9
_IMAGE_SIZE = (32, 128)
_WHOLE = "whole pipeline, both views normalised"
_RELEASED = "released manner, one process"
_RELEASED_IMGAUG = "released manner with imgaug, one process"
_IMGAUG_RECORDS = 400  # over a second of its time
GOAL, GOAL_RATIO = 1500, 25  # images/s a core of the whole pipeline; times the released manner's
_NAMES = {
    Stage.DECODE: "DALI: decode",
    Stage.PLAIN: "DALI: + bicubic resize: the plain view",
    Stage.FILTER: "DALI: + shrink and filter",
    Stage.WARP: "DALI and OpenCV: + warp: both views",
    Stage.AUGMENT: "DALI and OpenCV: the warped view alone",
}


class Row(NamedTuple):
    """One line of the table."""

    stage: str
    images_per_second: float
    lowest: float
    highest: float
    cpu_microseconds: float


class Inputs(NamedTuple):
    """A batch in memory."""

    encoded: list[bytes]
    program: GuidanceProgram


def measure(stage: str, batch: int, seconds: float, run: Callable[[], object]) -> Row:
    """Median, lowest and highest rate of five parts of `seconds` in all, after a warm-up; CPU time of all."""
    for _ in range(3):
        run()
    rates, images, used = [], 0, time.process_time()
    for _ in range(5):
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds / 5 or not count:
            run()
            count += batch
        rates.append(count / elapsed)
        images += count
    used = time.process_time() - used
    return Row(stage, statistics.median(rates), min(rates), max(rates), 1e6 * used / images)


def inputs_in_memory(store: RecordStore, batch: int) -> list[Inputs]:
    order, batches = SampleOrder(len(store), batch, 0), []
    for step in range(_MEMORY_BATCHES):
        epochs, indices = order.batch(step)
        images = store.images(indices.tolist())
        status, heights, widths = probe(images)
        good = np.flatnonzero(status == Status.OK)
        rows = np.resize(good, batch)  # broken records give way to good ones
        parameters = sample_parameters(
            GuidanceConfig(), 0, torch.from_numpy(epochs), torch.from_numpy(indices)
        )
        program = make_program(parameters, heights[rows], widths[rows])
        batches.append(Inputs([images[row] for row in rows], program))
    return batches


def dali_stage(stage: Stage, args: argparse.Namespace, batches: Iterator[Inputs]) -> Row:
    pipeline = build_pipeline(
        stage,
        batch_size=args.batch,
        threads=args.threads,
        device_id=0 if args.device == "gpu" else None,
        image_size=_IMAGE_SIZE,
    )

    def run() -> None:
        feed(pipeline, stage, *next(batches))
        pipeline.run()

    return measure(_NAMES[stage], args.batch, args.seconds, run)


def whole(stage: str, store: RecordStore, args: argparse.Namespace, guidance: bool, views: bool) -> Row:
    order = SampleOrder(len(store), args.batch, 0)
    with ViewPipeline(
        store,
        order,
        guidance=GuidanceConfig() if guidance else None,
        loader=DataConfig(threads=args.threads, device=args.device, max_bad_fraction=1.0),
        seed=0,
        device="cuda" if args.device == "gpu" else "cpu",
        end_step=_ENDLESS,
    ) as batches:

        def run() -> None:
            batch = next(batches)
            if views:
                batch.views()
            if args.device == "gpu":
                torch.cuda.synchronize()

        return measure(stage, args.batch, args.seconds, run)


def stages(store: RecordStore, args: argparse.Namespace) -> Iterator[Row]:
    batches = inputs_in_memory(store, args.batch)
    for stage in Stage:
        yield dali_stage(stage, args, itertools.cycle(batches))
    views = DaliViews(
        batch_size=args.batch,
        threads=args.threads,
        device=torch.device("cuda" if args.device == "gpu" else "cpu"),
        image_size=_IMAGE_SIZE,
        stage=Stage.WARP,
    )
    plain, warped = views(*batches[0])
    color = batches[0].program.color.to(plain.device)
    yield measure("photometric alone", args.batch, args.seconds, lambda: photometric(plain, warped, color))
    views.close()
    yield whole("whole pipeline, plain view alone", store, args, guidance=False, views=True)
    yield whole("whole pipeline, both views as bytes", store, args, guidance=True, views=False)
    yield whole(_WHOLE, store, args, guidance=True, views=True)
    yield released(store, args.seconds)
    if args.imgaug_python:
        yield released_with_imgaug(store, args.imgaug_python)


def released(store: RecordStore, seconds: float) -> Row:
    """Views in the released manner, on one core."""
    make, records = ReleasedViews(GuidanceConfig(), image_size=_IMAGE_SIZE), itertools.cycle(_good(store))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return measure(_RELEASED, 1, seconds, lambda: make(store.images([next(records)])[0]))
    finally:
        cv2.setNumThreads(threads)


def released_with_imgaug(store: RecordStore, python: str) -> Row:
    """The same with the library's operations, in an interpreter that has it."""
    images = store.images(_good(store)[:_IMGAUG_RECORDS])
    seconds = released_imgaug.in_process(python, images)
    rate = 1 / seconds
    return Row(_RELEASED_IMGAUG, rate, rate, rate, 1e6 * seconds)


def _good(store: RecordStore) -> list[int]:
    """Some records in random order, without broken ones."""
    _, indices = SampleOrder(len(store), min(len(store), 8192), 0).batch(0)
    chosen = indices.tolist()
    status = probe(store.images(chosen))[0]
    return [index for index, kind in zip(chosen, status.tolist(), strict=True) if kind == Status.OK]


def against_released(rows: list[Row], cores: int) -> list[dict[str, str | float]]:
    """How many cores in the released manner one core of the pipeline is worth, JSON-ready.

    By the clock: the pipeline has all cores and the other programs of the machine beside it. By CPU time:
    what the pipeline's own threads use.
    """
    ours = next(row for row in rows if row.stage == _WHOLE)
    return [
        {
            "stage": row.stage,
            "ratio_by_clock": ours.images_per_second / cores * row.cpu_microseconds / 1e6,
            "ratio_by_cpu_time": row.cpu_microseconds / ours.cpu_microseconds,
        }
        for row in rows
        if row.stage in (_RELEASED, _RELEASED_IMGAUG)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True, help="LMDB folders, or folders that hold some")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="per stage")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="DALI threads")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--imgaug-python", help="a Python with imgaug: measure the released library, too")
    parser.add_argument("--json", help="write the table there too")
    args = parser.parse_args(argv)
    store = RecordStore(args.data)
    machine = describe(torch.device("cuda" if args.device == "gpu" else "cpu"))
    settings = dict(batch=args.batch, dali_threads=args.threads, records=len(store))
    print(", ".join(f"{name} {value}" for name, value in (machine | settings).items() if name != "versions"))
    print(f"{'stage':40s} {'images/s':>9s} {'lowest':>9s} {'highest':>9s} {'CPU us':>9s}")
    rows: list[Row] = []
    for row in stages(store, args):
        rates = f"{row.images_per_second:9.0f} {row.lowest:9.0f} {row.highest:9.0f}"
        print(f"{row.stage:40s} {rates} {row.cpu_microseconds:9.1f}", flush=True)
        rows.append(row)
    cores = machine["cores"]
    ratios = against_released(rows, cores)
    rate = next(row.images_per_second for row in rows if row.stage == _WHOLE)
    print(f"{_WHOLE}: {rate:,.0f} images/s on {cores} cores, goal {GOAL * cores:,}")
    for item in ratios:
        print(
            f"a core against one in the {item['stage']}: {item['ratio_by_clock']:.1f}x by the clock,"
            f" {item['ratio_by_cpu_time']:.1f}x by CPU time, goal {GOAL_RATIO}x"
        )
    if args.json:
        goals = dict(images_per_second_a_core=GOAL, ratio_a_core=GOAL_RATIO)
        table = dict(rows=[row._asdict() for row in rows], released=ratios, goals=goals)
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(dict(benchmark="data", **machine, **settings, **table), file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
