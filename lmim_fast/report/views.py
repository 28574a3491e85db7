"""The first crops that a run trained on, through its own records, order and views, and their sheet."""

from __future__ import annotations

import dataclasses
import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmim_fast.data.batch import Batch
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.store.records import Records
from lmim_fast.report.images import crop_html, crop_pixels
from lmim_fast.report.run import Run
from lmim_fast.train.task import Task
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World


@dataclass(frozen=True)
class Crops:
    """A batch as the run saw it at its start."""

    indices: Tensor
    """(B,) int64 sample indices."""
    epochs: Tensor
    """(B,) int64."""
    labels: list[str | None]
    """Ground truth where the database has it."""
    broken: list[str | None]
    """Why a record was replaced by its substitute; None where it was not."""
    plain: Tensor
    """(B, 3, H, W) float32 in [-1, 1]."""
    second: Tensor | None
    """(B, 3, H, W) float32 in [-1, 1]: guidance view or augmented crop; None where the run has neither."""
    second_title: str
    """What the second view is."""
    changed: bool
    """The data is no longer what config.json describes."""


def load_crops(run: Run, count: int) -> Crops:
    """The first `count` crops of the run's order (all, where there are fewer), with their first views.

    Raises:
        UsageError: the data is not where config.json says.
        DataError:  it cannot be used.
    """
    config = run.config
    # Substitutes are shown and named here: no share of broken records stops a report.
    # A skip list that is gone is no loss: its records are then met, replaced alike and named.
    skip = config.loader.skip if config.loader.skip and Path(config.loader.skip).is_file() else None
    loader = dataclasses.replace(
        config.loader, device="cpu", prefetch=1, threads=0, max_bad_fraction=1.0, skip=skip
    )
    task = make_task(dataclasses.replace(config, loader=loader, accumulation=1))
    store = task.records(lambda _: None)
    try:
        order = SampleOrder(len(store), min(count, len(store)), config.seed)
        batch, reasons = _first_batch(task, store, order)
        plain, second = batch.views(torch.float32)
        plainly = task.without_augmentation()
        if plainly is not None:
            second = batch.images(torch.float32)
            plain = _first_batch(plainly, store, order)[0].images(torch.float32)
        indices = [int(index) for index in batch.indices]
        broken = [reasons.get(store.locate(index)) for index in indices]
        labels = [None if bad else store.label(index) for index, bad in zip(indices, broken, strict=True)]
        expected = run.document.get("data")
        changed = expected is not None and store.fingerprint() != expected
    finally:
        store.close()
    return Crops(batch.indices, batch.epochs, labels, broken, plain, second, task.second_view, changed)


def _first_batch(task: Task, store: Records, order: SampleOrder) -> tuple[Batch, dict[tuple[str, str], str]]:
    """The first batch of an order, and why records were replaced in it."""
    with task.pipeline(store, order, World(0, 1, torch.device("cpu")), 0, 1) as pipeline:
        batch = next(iter(pipeline))
        reasons = {(database, key): reason for database, key, reason in pipeline.bad.entries}
        skipped = pipeline.bad.skipped
        listed = [int(index) for index in batch.indices if int(index) in skipped]
        return batch, reasons | {store.locate(index): f"skipped: {skipped[index]}" for index in listed}


def sheet_html(crops: Crops, count: int) -> str:
    """The first `count` crops as a grid: plain view, second view under it, label."""
    plain = crop_pixels(crops.plain[:count])
    second = None if crops.second is None else crop_pixels(crops.second[:count])
    tiles = [_tile(crops, place, plain, second) for place in range(len(plain))]
    what = "the plain view"
    if second is not None:
        what += f", and under it the {crops.second_title}"
    changed = (
        '<p class="warning">The data has changed since the run: these are crops of the data as it is now.</p>'
        if crops.changed
        else ""
    )
    intro = f"<p>The first crops of the run's own sample order: {what}, as the model got them.</p>"
    return f'{changed}{intro}<div class="sheet">{"".join(tiles)}</div>'


def label_html(crops: Crops, place: int) -> str:
    """The label of a crop, or what stands in its place, ready for the page."""
    label, reason = crops.labels[place], crops.broken[place]
    if reason is not None:
        return f'<span class="label absent">substitute: {html.escape(reason)}</span>'
    if label is None:
        return '<span class="label absent">no label</span>'
    return f'<span class="label" title="{html.escape(label)}">{html.escape(label)}</span>'


def _tile(crops: Crops, place: int, plain: np.ndarray, second: np.ndarray | None) -> str:
    label = crops.labels[place] or "no label"
    views = crop_html(plain[place], f"plain view: {label}")
    if second is not None:
        views += crop_html(second[place], f"{crops.second_title}: {label}")
    number = f'<span class="note">#{int(crops.indices[place])}</span>'
    return f"<figure>{views}<figcaption>{label_html(crops, place)}{number}</figcaption></figure>"
