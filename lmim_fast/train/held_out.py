"""The loss of held-out crops while a model trains: always the same crops, views and masks."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lmim_fast import faults
from lmim_fast.config import FinetuneConfig, RunConfig
from lmim_fast.data.batch import Batch
from lmim_fast.data.order import Int64Array, SampleOrder
from lmim_fast.data.store.databases import find_databases
from lmim_fast.errors import DataError, UsageError
from lmim_fast.train.side_files import HELD_OUT_FILE, append, drop_lines_after
from lmim_fast.train.task import Say, Task
from lmim_fast.train.telemetry import Value
from lmim_fast.train.world import World


class HeldOut:
    """Measures the losses of `eval_images` crops of `eval_data`; every rank calls it, at the same step.

    The crops are the first of the run's order of that data in epoch 0, with the views and masks of
    (seed, epoch 0, index) and without augmentation. Each rank makes the views of its share once, here, and
    keeps them on the host: 12 KB a crop of 32 x 128, about three times that with a guidance view. No
    collective call is made here.

    Args:
        task:  of the run, its config settled.
        world: the ranks that share the crops; the result depends on their number by rounding alone.
        say:   is told what is wrong with the labels, if the crops have any; None: nobody is.
    Raises:
        UsageError: a path of `eval_data` holds no records.
        DataError:  they cannot be used, or too many are broken.
    """

    def __init__(self, task: Task, world: World, say: Say | None = None) -> None:
        config = task.config
        try:
            find_databases(config.eval_data)
        except DataError as error:  # a path that holds no data is a wrong option; damaged data is not
            raise UsageError(f"--eval-data {error}") from error
        self._world, self._run, self._every = world, Path(config.output), config.eval_every
        size = max(1, config.batch_size // (config.accumulation * world.size))  # as in training
        self._task = _measured(task, size)
        store = self._task.records(lambda line: None if say is None else say(f"held-out {line}"))
        try:
            self.images = min(config.eval_images, len(store))
            """Crops that are measured, over all ranks."""
            order = _Share(len(store), self.images, size, config.seed, world)
            passes = -(-self.images // (world.size * size))  # the same on all ranks: a pass may have none
            alone = World(0, 1, world.device)
            with self._task.pipeline(store, order, alone, 0, passes) as batches:
                self._passes = [_kept(batch, order.crops(place)) for place, batch in enumerate(batches)]
        finally:
            store.close()

    def is_due(self, step: int, total: int) -> bool:
        """Whether the model is measured after `step` steps of `total`."""
        return step % self._every == 0 or step == total

    def __call__(self, model: nn.Module, step: int) -> dict[str, Value]:
        """Measure the model as it is, and write the line to eval.jsonl.

        Its weights and modes, and torch's random numbers, are afterwards what they were.

        Args:
            model: what `Task.losses` takes; it may be sharded or compiled.
            step:  steps done.
        Returns:
            The line: step, and the mean of each loss over all crops; None if it is not finite.
        Raises:
            LmimError: a rank failed; the others raise too.
        """
        world = self._world
        with world.together():
            faults.point("evaluation")
            sums = self._sums(model)
        world.mean_(sums)
        means = (sums * (world.size / self.images)).tolist()
        line: dict[str, Value] = {"step": step}
        for name, mean in zip(self._task.loss_names, means, strict=True):
            line[name] = mean if math.isfinite(mean) else None
        with world.together():
            if world.is_main:
                path = self._run / HELD_OUT_FILE
                drop_lines_after(path, step - 1)  # of a run that went on from an older checkpoint
                append(path, [json.dumps(line, allow_nan=False)])
        return line

    def _sums(self, model: nn.Module) -> Tensor:
        """(k,) fp64 losses, each summed over this rank's crops."""
        device = self._world.device
        sums = torch.zeros(len(self._task.loss_names), dtype=torch.float64, device=device)
        modes = [(module, module.training) for module in model.modules()]
        generators = [device] if device.type == "cuda" else []
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(generators):
                for batch, crops in self._passes:
                    here = batch.with_tensors([tensor.to(device) for tensor in batch.tensors()])
                    losses = self._task.losses(model, here)  # also for no crops: a sharded model needs all
                    if crops:
                        sums += losses.double() * crops
        finally:
            for module, mode in modes:
                module.training = mode
                if isinstance(module, FSDPModule):
                    module.reshard()  # what was gathered may be of averaged weights
        return sums


def _measured(task: Task, size: int) -> Task:
    """The task of the held-out data: plain views, passes of `size` crops."""
    plain = task.without_augmentation() or task
    config: RunConfig = dataclasses.replace(
        plain.config, data=plain.config.eval_data, batch_size=size, accumulation=1
    )
    if isinstance(config, FinetuneConfig):
        config = dataclasses.replace(config, weights=())  # of the training data's paths
    return type(task)(config)


def _kept(batch: Batch, crops: int) -> tuple[Batch, int]:
    """A batch on the host without the rows that fill it up, and how many crops it is."""
    rows = max(1, crops)
    return batch.with_tensors([tensor[:rows].cpu().clone() for tensor in batch.tensors()]), crops


class _Share(SampleOrder):
    """The first `images` samples of epoch 0, of which this rank takes every `world.size`-th in passes.

    The last pass is filled up with the first sample.
    """

    def __init__(self, records: int, images: int, size: int, seed: int, world: World) -> None:
        super().__init__(records, size, seed)
        self._chosen = super().places(0, images)
        self._own = np.arange(world.rank, images, world.size)

    def crops(self, place: int) -> int:
        """Crops of this rank in a pass, the filling left out."""
        return int(np.clip(len(self._own) - place * self.batch_size, 0, self.batch_size))

    def places(self, first: int, size: int) -> tuple[Int64Array, Int64Array]:
        """As `SampleOrder.places`, of this rank's samples."""
        rows = np.zeros(size, dtype=np.int64)
        own = self._own[first : first + size]
        rows[: len(own)] = own
        epochs, indices = self._chosen
        return epochs[rows], indices[rows]
