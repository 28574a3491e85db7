"""Serial CPU time of preparing batches, by part: what bounds a process, whatever the number of cores.

All parts run in one thread here, on the clock of that thread; DALI's own threads are not on it. In training
three threads share them, and the interpreter's lock.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmim_fast.config import DataConfig, GuidanceConfig, RenderConfig

if TYPE_CHECKING:
    from lmim_fast.data.store.gather import EncodedImages
    from lmim_fast.data.store.records import RecordStore

PARTS = ("order", "records and probe", "draws", "programs", "feeding")
_IMAGE_SIZE = (32, 128)
_RENDERED = 2048  # crops
_WARMUP = 2
_SEED = 0


def measure(paths: Sequence[str], batch: int, rounds: int, rendered: int = _RENDERED) -> dict[str, Any]:
    """Microseconds an image by part, of each round, a batch each; JSON-ready.

    The permutation of an epoch falls into few rounds, so no median has it. What this machine cannot do is
    left out, and `left_out` says why.

    Args:
        paths:    LMDB folders; none: words are rendered into a temporary one.
        batch:    images.
        rounds:   timed batches.
        rendered: words in the temporary LMDB.
    """
    result: dict[str, Any] = {"batch": batch, "source": [Path(path).name for path in paths] or "rendered"}
    try:
        from lmim_fast.data.store.records import RecordStore
    except ImportError as error:
        return result | {"microseconds": {}, "left_out": {part: _reason(error) for part in PARTS}}
    if paths:
        return result | _of_store(RecordStore(paths), batch, rounds)
    with tempfile.TemporaryDirectory() as folder:
        try:
            from lmim_fast.data.render.database import render

            render(RenderConfig(output=f"{folder}/data", count=rendered, processes=1))
        except ImportError as error:
            return result | {"microseconds": {}, "left_out": {part: _reason(error) for part in PARTS}}
        return result | _of_store(RecordStore([f"{folder}/data"]), batch, rounds)


def _of_store(store: RecordStore, batch: int, rounds: int) -> dict[str, Any]:
    from lmim_fast.data.guidance.parameters import sample_parameters
    from lmim_fast.data.guidance.program import make_program
    from lmim_fast.data.order import SampleOrder
    from lmim_fast.data.samples import BadRecords, SampleReader

    order = SampleOrder(len(store), batch, _SEED)
    reader = SampleReader(store, order, BadRecords(store, 1.0), DataConfig().max_pixels)
    feeder, left_out = _feeder(batch)
    times: dict[str, list[float]] = {part: [] for part in PARTS if part not in left_out}
    for step in range(_WARMUP + rounds):
        clock = time.thread_time
        marks = [clock()]
        share = order.share(step, 0, 1, 0, 1)
        marks.append(clock())
        samples = reader.read(*share)
        marks.append(clock())
        drawn = sample_parameters(GuidanceConfig(), _SEED, *(torch.from_numpy(part) for part in share))
        marks.append(clock())
        program = make_program(drawn, samples.heights, samples.widths, _IMAGE_SIZE)
        marks.append(clock())
        if feeder is not None:
            feeder.feed(samples.encoded, program)
            marks.append(clock())
            feeder.run()
        for part, (start, end) in zip(times, itertools.pairwise(marks), strict=True):
            times[part].append(1e6 * (end - start) / batch)
    store.close()
    measured = {part: values[_WARMUP:] for part, values in times.items()}
    measured["total"] = [sum(each) for each in zip(*measured.values(), strict=True)]
    total = statistics.median(measured["total"])
    return {
        "records": len(store),
        "microseconds": measured,
        "images_per_second": 1e6 / total,
        "left_out": left_out,
    }


class _Feeder:
    """A DALI pipeline of both views, fed and run."""

    def __init__(self, batch: int) -> None:
        from lmim_fast.data import dali

        self._dali, self._stage = dali, dali.Stage.WARP
        self._pipeline = dali.build_pipeline(
            self._stage, batch_size=batch, threads=1, device_id=None, image_size=_IMAGE_SIZE
        )

    def feed(self, encoded: EncodedImages, program: Any) -> None:
        """What is timed."""
        self._dali.feed(self._pipeline, self._stage, encoded, program)

    def run(self) -> None:
        """Make the views, so that the next batch can be fed."""
        self._pipeline.run()


def _feeder(batch: int) -> tuple[_Feeder | None, dict[str, str]]:
    """A feeder, or why there is none."""
    try:
        return _Feeder(batch), {}
    except ImportError as error:
        return None, {"feeding": _reason(error)}


def _reason(error: ImportError) -> str:
    return str(error).splitlines()[0]
