"""Batches of plain and guidance views, or of augmented views, in training order, ahead of the consumer.

Three threads: one follows the sample order, one reads the records and writes the guidance programs, one runs
DALI. A sample's views are a function of (seed, epoch, index) alone; a run's place in the order is a step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import TracebackType
from typing import NamedTuple

import torch

from lmim_fast import faults
from lmim_fast.config import AugmentConfig, DataConfig, GuidanceConfig
from lmim_fast.data.augment.keys import Keys
from lmim_fast.data.augment.program import (
    AugmentParameters,
    AugmentProgram,
    make_augment_program,
    sample_augmentation,
)
from lmim_fast.data.background import Background
from lmim_fast.data.batch import Batch
from lmim_fast.data.dali import BrokenImages, DaliViews, Stage, start_workers
from lmim_fast.data.guidance.parameters import GuidanceParameters, sample_parameters
from lmim_fast.data.guidance.program import GuidanceProgram, make_program
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.samples import UNDECODABLE, BadRecords, SampleReader, Samples
from lmim_fast.data.skip_list import SkipList
from lmim_fast.data.store.records import Records
from lmim_fast.errors import UsageError
from lmim_fast.native import native

# Shares drawn ahead, a few MB: seconds of training, so that at the end of an epoch the next permutation
# (3 s for 10 M samples) is there in time.
_SHARES_AHEAD = 256
# Records read at once, whatever the cores: a thread that waits for the disk needs none. On 2 cores, 8 threads
# read a cold database larger than the memory 1.5 times as fast as 2; a warm one takes a tenth more time.
_READERS = 8


class _Prepared(NamedTuple):
    step: int
    micro: int
    samples: Samples
    parameters: GuidanceParameters | AugmentParameters | None
    program: GuidanceProgram | AugmentProgram | None


class ViewPipeline:
    """Iterator of `Batch` from `start_step`, micro 0 to the last one before `end_step`; context manager.

    Args:
        store:        records.
        order:        of the samples.
        guidance:     strength of the guidance view; None: no such view.
        augment:      of the view that takes the plain view's place; None: not augmented.
        labels:       (B, T) int64 targets of records; they become `Batch.targets`.
        loader:       threads, prefetch, device of the views, tolerance for broken records.
        seed:         the run's.
        image_size:   height and width of the views.
        rank:         this process of `world_size`.
        accumulation: micro-batches of a step.
        device:       where the batches end up.
        end_step:     the step after the last one.
    Raises:
        UsageError: loader.device "gpu" without a CUDA device, a batch size that does not divide, or a skip
            list that cannot be read, names a record that its database lacks, or leaves no record.
        ValueError: guidance and augmented views in one pipeline.
        DataError:  (from `next`) too many broken records.
    """

    def __init__(
        self,
        store: Records,
        order: SampleOrder,
        *,
        guidance: GuidanceConfig | None,
        augment: AugmentConfig | None = None,
        labels: Callable[[list[int]], torch.Tensor] | None = None,
        loader: DataConfig,
        seed: int,
        image_size: tuple[int, int] = (32, 128),
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        device: torch.device | str = "cpu",
        start_step: int = 0,
        end_step: int,
    ) -> None:
        self._augment = None if augment is None or augment.kind == "none" else augment
        if guidance is not None and self._augment is not None:
            raise ValueError("a pipeline makes guidance or augmented views, not both")
        self._guidance, self._seed, self._image_size = guidance, seed, image_size
        self._device, self._labels = torch.device(device), labels
        if loader.device == "gpu" and self._device.type != "cuda":
            raise UsageError(f'loader device "gpu" needs training on a CUDA device, not on {self._device}')
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        batch_size = order.share_size(world_size, accumulation)
        skipped = SkipList.read(loader.skip).reasons(store) if loader.skip else None
        self.bad = BadRecords(store, loader.max_bad_fraction, skipped)
        threads = loader.threads or default_threads(world_size)
        module = native()
        self._workers = None if module is None else start_workers(module, threads)
        readers = None if module is None else start_workers(module, max(threads, _READERS))
        self._reader = SampleReader(store, order, self.bad, loader.max_pixels, readers)
        views_on = self._device if loader.device != "cpu" else torch.device("cpu")
        self._pinned = views_on.type == "cuda"
        self._dali = DaliViews(
            batch_size=batch_size,
            threads=threads,
            device=views_on,
            image_size=image_size,
            stage=self._stage(),
        )
        shares = (
            (step, micro, order.share(step, rank, world_size, micro, accumulation))
            for step in range(start_step, end_step)
            for micro in range(accumulation)
        )
        self._shares = Background(shares, _SHARES_AHEAD, "lmim-order")
        self._prepared = Background(self._prepare(), loader.prefetch, "lmim-programs")
        self._batches = Background(self._run(), loader.prefetch, "lmim-views")

    def __enter__(self) -> ViewPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> ViewPipeline:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._batches)
        if self._device.type == "cuda":
            _hand_over(batch)
        batch.wait_seconds = time.perf_counter() - start
        return batch

    def close(self) -> None:
        """End the threads and free the DALI pipeline; the store stays open."""
        self._shares.close()
        self._prepared.close()
        self._batches.close()
        self._dali.close()
        self._reader.close()
        self._workers = None

    def _stage(self) -> Stage:
        if self._augment is not None:
            return Stage.AUGMENT
        return Stage.PLAIN if self._guidance is None else Stage.WARP

    def _prepare(self) -> Iterator[_Prepared]:
        for step, micro, share in self._shares:
            faults.point("batch")
            samples = self._reader.read(*share)
            parameters: GuidanceParameters | AugmentParameters | None = None
            if self._guidance is not None:
                parameters = sample_parameters(self._guidance, *self._keys(samples))
            elif self._augment is not None:
                parameters = sample_augmentation(self._augment, self._keys(samples))
            yield _Prepared(step, micro, samples, parameters, self._program(samples, parameters))

    def _keys(self, samples: Samples) -> Keys:
        return Keys(self._seed, torch.from_numpy(samples.epochs), torch.from_numpy(samples.indices))

    def _program(
        self, samples: Samples, parameters: GuidanceParameters | AugmentParameters | None
    ) -> GuidanceProgram | AugmentProgram | None:
        if parameters is None:
            return None
        if isinstance(parameters, GuidanceParameters):
            return make_program(
                parameters,
                samples.heights,
                samples.widths,
                self._image_size,
                workers=self._workers,
                pinned=self._pinned,
            )
        keys = self._keys(samples)
        return make_augment_program(parameters, keys, samples.heights, samples.widths, self._image_size)

    def _run(self) -> Iterator[Batch]:
        for prepared in self._prepared:
            yield self._finish(prepared)

    def _finish(self, prepared: _Prepared) -> Batch:
        samples, program = prepared.samples, prepared.program
        with torch.cuda.stream(self._stream):  # no effect without CUDA
            while True:
                try:
                    views = self._dali(samples.encoded, program)
                    break
                except BrokenImages as broken:
                    for row in broken.rows:
                        self._reader.replace(samples, row, UNDECODABLE)
                    program = self._program(samples, prepared.parameters)
            views = [view.to(self._device) for view in views]
            if isinstance(program, AugmentProgram):
                views = [program.finish(views[0])]
            batch = Batch(
                step=prepared.step,
                micro=prepared.micro,
                indices=torch.from_numpy(samples.indices),
                epochs=torch.from_numpy(samples.epochs),
                plain=views[0],
                warped=views[1] if len(views) > 1 else None,
                program=program.color.to(self._device) if isinstance(program, GuidanceProgram) else None,
                # Of the record that is shown, which may be a substitute.
                targets=None if self._labels is None else self._labels(samples.sources).to(self._device),
            )
        if self._stream is not None:
            self._stream.synchronize()  # this thread waits, the training loop does not
        return batch


def _hand_over(batch: Batch) -> None:
    """Record with CUDA's allocator that the consumer's stream uses tensors of the pipeline's stream."""
    tensors = [batch.plain, batch.warped]
    if batch.program is not None:
        tensors += [getattr(batch.program, item.name) for item in fields(batch.program)]
    tensors.append(batch.targets)
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def default_threads(world_size: int) -> int:
    """This process's cores, shared among the processes of this machine (torchrun says how many)."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return max(1, len(os.sched_getaffinity(0)) // local_processes)
