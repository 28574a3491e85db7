"""`lmim data inspect --replay`: a sample as training had it, its operations and mask, as text and PNG."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from lmim_fast.config import FinetuneConfig, InspectConfig, PretrainConfig, RunConfig
from lmim_fast.data.augment.keys import Keys
from lmim_fast.data.augment.program import sample_augmentation
from lmim_fast.data.guidance.parameters import sample_parameters
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.samples import BadRecords
from lmim_fast.data.store.records import Records
from lmim_fast.data.tools.captions import caption
from lmim_fast.data.tools.chosen import ChosenSamples
from lmim_fast.data.tools.files import require_writable
from lmim_fast.data.tools.operations import augment_lines, guidance_lines
from lmim_fast.data.tools.sheet import decoded_crops, fitted, write_png
from lmim_fast.data.visible import visible
from lmim_fast.errors import UsageError
from lmim_fast.report.images import crop_pixels, masked_pixels
from lmim_fast.report.run import read_config
from lmim_fast.train.pretraining import LmimTask, MaeTask
from lmim_fast.train.start import RANDOM_TEACHER
from lmim_fast.train.task import Task
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World

_ENLARGED = 4  # pixels of the picture for each one of a view
_GAP = 12


@dataclass(frozen=True)
class Replayed:
    """One sample of training."""

    epoch: int
    index: int
    source: int
    """The record that is shown: the sample's own, or the substitute of a broken one."""
    broken: str | None
    """Why it is a substitute; None where it is not."""
    plain: Tensor
    """(3, H, W) float32 in [-1, 1], as the model gets it."""
    second: Tensor | None
    """(3, H, W) guidance view or augmented crop; None where the run has neither."""
    second_title: str
    operations: tuple[str, ...]
    """What was drawn for the second view, in the order applied."""
    ids_masked: Tensor | None
    """(L - K,) int64 masked patches, rising; None where the objective masks nothing."""


def replay(config: InspectConfig) -> list[str]:
    """Write the picture of a sample; what is to be said of it, line by line.

    Raises:
        UsageError: a wrong path, or an index that the data does not have.
        DataError:  the data cannot be used.
        LmimError:  config.json cannot be used.
    """
    seed, epoch, index = config.replay
    require_writable(Path(config.output))
    run, document = _run_config(config, seed)
    skip = run.loader.skip
    is_gone = skip is not None and not Path(skip).is_file()
    if is_gone:
        run = dataclasses.replace(run, loader=dataclasses.replace(run.loader, skip=None))
    task = make_task(dataclasses.replace(run, seed=seed))
    store = task.records(lambda _: None)
    try:
        if index >= len(store):
            raise UsageError(
                f"--replay: index {index} is outside of the {len(store):,} records, 0 .. {len(store) - 1}"
            )
        device = _device(task.config)
        sample = replay_sample(task, store, epoch, index, device)
        lines = _lines(sample, task, store, device)
        if "seed" in document and document["seed"] != seed:
            lines.insert(1, f"note: the seed of the run is {document['seed']}, this is another sample of it")
        if is_gone:
            gone = f"warning: the skip list {visible(str(skip))} is not there"
            lines.insert(1, f"{gone}, so only broken records are replaced")
        expected = document.get("data")
        if expected is not None and store.fingerprint() != expected:
            lines.insert(1, "warning: the data is no longer what the run was trained on")
        write_png(Path(config.output), _picture(sample, task, store, lines))
    finally:
        store.close()
    return [*lines, f"picture in {visible(config.output)}"]


def replay_sample(
    task: Task, store: Records, epoch: int, index: int, device: torch.device | None = None
) -> Replayed:
    """A sample as the batches of the task have it: a function of (seed, epoch, index).

    Args:
        store:  the task's records.
        index:  below their number.
        device: where the views are made, in training the device of the model; None: the CPU.
    Raises:
        DataError: no readable record can stand in for a broken one.
    """
    device = device or torch.device("cpu")
    plain, second, bad = _views(task, store, epoch, index, device)
    plainly = task.without_augmentation()
    if plainly is not None:  # its batches hold the augmented crop only
        second, plain = plain, _views(plainly, store, epoch, index, device)[0]
    source = _source(task.order(store), bad, epoch, index)
    return Replayed(
        epoch=epoch,
        index=index,
        source=source,
        broken=None if source == index else _reason(store, bad, index),
        plain=plain,
        second=second,
        second_title=task.second_view,
        operations=tuple(_operations(task, epoch, index)),
        ids_masked=_masked(task, epoch, index),
    )


def _reason(store: Records, bad: BadRecords, index: int) -> str:
    """Why a record is replaced."""
    if index in bad.skipped:
        return f"on the skip list, {bad.skipped[index] or 'without a reason'}"
    return {(database, key): reason for database, key, reason in bad.entries}[store.locate(index)]


def _run_config(config: InspectConfig, seed: int) -> tuple[RunConfig, dict[str, Any]]:
    """The run whose sample is shown, and what its config.json says of data and seed."""
    if config.run is None:
        return PretrainConfig(data=config.paths, seed=seed, teacher=RANDOM_TEACHER, view=config.view), {}
    run, document = read_config(Path(config.run))
    if config.paths:
        if isinstance(run, FinetuneConfig) and len(config.paths) != len(run.data) and run.weights:
            raise UsageError(f"the run mixes {len(run.data)} paths of data: give as many, in its order")
        run = dataclasses.replace(run, data=config.paths)
    return run, {"data": document.get("data"), "seed": run.seed}


def _device(config: RunConfig) -> torch.device:
    """Where a run of this config makes its views on this machine."""
    on_cpu = "cpu" in (config.device, config.loader.device) or not torch.cuda.is_available()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _views(
    task: Task, store: Records, epoch: int, index: int, device: torch.device
) -> tuple[Tensor, Tensor | None, BadRecords]:
    """The first and the second view of a sample's batch, and the broken records met for it."""
    # A substitute is shown and named here: no share of broken records stops it.
    loader = dataclasses.replace(
        task.config.loader, device="auto", prefetch=1, threads=1, max_bad_fraction=1.0
    )
    alone = make_task(dataclasses.replace(task.config, loader=loader, accumulation=1))
    order = ChosenSamples(task.order(store), [epoch], [index])
    with alone.pipeline(store, order, World(0, 1, device), 0, 1) as pipeline:
        first, second = next(pipeline).views(torch.float32)
        return first[0], None if second is None else second[0], pipeline.bad


def _source(order: SampleOrder, bad: BadRecords, epoch: int, index: int) -> int:
    """The record that stands for a sample once the broken ones are known."""
    source, attempt = index, 0
    while source in bad:
        source = order.substitute(epoch, index, attempt)
        attempt += 1
    return source


def _operations(task: Task, epoch: int, index: int) -> list[str]:
    """What was drawn for the second view; nothing without one."""
    config = task.config
    keys = Keys(config.seed, torch.tensor([epoch]), torch.tensor([index]))
    if isinstance(config, PretrainConfig) and task.guided:
        return guidance_lines(sample_parameters(config.view, *keys))
    if isinstance(config, FinetuneConfig) and config.augment.kind != "none":
        return augment_lines(sample_augmentation(config.augment, keys))
    return []


def _masked(task: Task, epoch: int, index: int) -> Tensor | None:
    if not isinstance(task, LmimTask | MaeTask):
        return None
    return task.draw_patches(torch.tensor([epoch]), torch.tensor([index]))[1][0]


def _lines(sample: Replayed, task: Task, store: Records, device: torch.device) -> list[str]:
    """All that is to be said of a sample."""
    seed, epoch, index = task.config.seed, sample.epoch, sample.index
    label = store.label(sample.source)
    lines = [f"seed {seed}, epoch {epoch}, index {index}"]
    if sample.broken is not None:
        path, key = store.locate(index)
        lines.append(
            f"broken: {visible(path)} {key}: {sample.broken}; its substitute is index {sample.source}"
        )
    path, key = store.locate(sample.source)
    lines.append(f"record: {visible(path)} {key}")
    lines.append(f"label: {'none' if label is None else visible(label)}")
    if sample.operations:
        lines.append(f"{sample.second_title}:")
        lines += [f"  {number}. {text}" for number, text in enumerate(sample.operations, 1)]
    if sample.ids_masked is not None:
        patches = task.config.encoder.num_patches
        lines.append(f"mask: {len(sample.ids_masked)} of {patches} patches are masked")
    lines.append(f"views made on {device.type}")
    return lines


def _picture(sample: Replayed, task: Task, store: Records, lines: Sequence[str]) -> np.ndarray:
    """The crop and its views one below the other, each with its name, and the lines beside them."""
    plain = crop_pixels(sample.plain[None])[0]
    height, width = (_ENLARGED * side for side in plain.shape[:2])
    crop = decoded_crops(store, [sample.source])[0][0]
    parts: list[tuple[str, np.ndarray]] = []
    if crop is not None:
        size = f"{crop.shape[1]} x {crop.shape[0]} pixels"
        parts.append((f"crop, {size}", fitted(crop, (height, width))))
    parts.append(("plain view", _enlarged(plain)))
    if sample.ids_masked is not None:
        masked = masked_pixels(plain, sample.ids_masked.cpu().numpy(), task.config.encoder.patch_size)
        parts.append(("its visible patches", _enlarged(masked)))
    if sample.second is not None:
        parts.append((sample.second_title, _enlarged(crop_pixels(sample.second[None])[0])))
    left = np.concatenate([part for name, pixels in parts for part in (caption(name, width), pixels)])
    right = np.concatenate([caption(line, width) for line in lines])
    picture = np.full((max(len(left), len(right)) + 2 * _GAP, 2 * width + 3 * _GAP, 3), 255, np.uint8)
    picture[_GAP : _GAP + len(left), _GAP : _GAP + width] = left
    picture[_GAP : _GAP + len(right), 2 * _GAP + width : 2 * (_GAP + width)] = right
    return picture


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """Each pixel seen as a square."""
    return np.asarray(cv2.resize(pixels, None, fx=_ENLARGED, fy=_ENLARGED, interpolation=cv2.INTER_NEAREST))
