"""Read every labelled image of a store once, on any number of processes, and count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmim_fast.data.dali import BrokenImages, DaliViews, Stage
from lmim_fast.data.normalize import waics
from lmim_fast.data.pipeline import default_threads
from lmim_fast.data.samples import UNDECODABLE, decodable, reason_of
from lmim_fast.data.store.probe import Status
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import UsageError, shared
from lmim_fast.evaluation.metrics import Normalize, Score, is_correct, score_readings
from lmim_fast.train.world import World

Precision = Literal["auto", "bf16", "fp32"]


class ReadingLike(Protocol):
    """What scoring needs of `models.recognizer.Reading`."""

    @property
    def strings(self) -> list[str]:
        """Texts of B images."""

    @property
    def word_probabilities(self) -> Tensor:
        """(B,) fp32."""


class RecognizerLike(Protocol):
    """What scoring needs of `models.recognizer.Recognizer`, which is an `nn.Module` too."""

    @property
    def config(self) -> Any:
        """A `RecognizerConfig`."""

    @property
    def characters(self) -> str:
        """Those that it reads."""

    def greedy(self, images: Tensor) -> ReadingLike:
        """Read B images, (B, H, W, 3) uint8."""

    def beam_search(self, images: Tensor, width: int) -> ReadingLike:
        """Read B images with `width` beams."""

    def modules(self) -> Iterator[nn.Module]:
        """All modules, for their training flags."""


@dataclass(frozen=True)
class Readings:
    """Readings of N labelled images, in the order of their records; columns of equal length."""

    indices: NDArray[np.int64]
    """(N,) record in the store."""
    labels: list[str]
    strings: list[str]
    """"" where the image is broken."""
    probabilities: NDArray[np.float32]
    """(N,) probability of the whole word; 0 where the image is broken."""
    correct: NDArray[np.bool_]
    """(N,) equal to the label after normalisation."""
    broken: dict[int, str]
    """Record -> why its image cannot be decoded."""
    unlabelled: int
    """Records that were left out because they have no label."""

    @classmethod
    def joined(cls, parts: Sequence[Readings]) -> Readings:
        """Disjoint readings as one, in the order of the records."""
        indices = np.concatenate([part.indices for part in parts])
        order = np.argsort(indices)
        labels = [label for part in parts for label in part.labels]
        strings = [text for part in parts for text in part.strings]
        broken = {index: reason for part in parts for index, reason in part.broken.items()}
        return cls(
            indices[order],
            [labels[place] for place in order],
            [strings[place] for place in order],
            np.concatenate([part.probabilities for part in parts])[order],
            np.concatenate([part.correct for part in parts])[order],
            dict(sorted(broken.items())),
            sum(part.unlabelled for part in parts),
        )

    def score(self, normalize: Normalize) -> Score:
        """The counts of these readings."""
        readings = [
            None if index in self.broken else text
            for index, text in zip(self.indices.tolist(), self.strings, strict=True)
        ]
        return score_readings(self.labels, readings, normalize, unlabelled=self.unlabelled)


def evaluate_store(
    model: RecognizerLike,
    store: RecordStore,
    world: World,
    *,
    batch_size: int = 256,
    precision: Precision = "auto",
    beam: int = 1,
    threads: int = 0,
    normalize: Normalize = waics,
) -> tuple[Score, Readings]:
    """Read every labelled record of `store` exactly once; every rank calls this and gets the same result.

    Batch b is records b x batch_size ..., and belongs to rank b modulo the world's size: batches, and with
    them every reading, are the same at any world size. Images get training's own resize. A broken image is
    wrong; a record without a label is not counted.

    Args:
        model:      on `world.device`; its training flags are as before afterwards.
        store:      records of one test set.
        batch_size: images that a process reads at once.
        precision:  type of the products; "auto" is bf16 on CUDA, fp32 on a CPU.
        beam:       beams of the search, 1 is greedy.
        threads:    DALI threads; 0 takes this process's share of the CPU cores.
        normalize:  what labels and readings become before they are compared.
    Returns:
        the score and the readings, in the order of the records.
    Raises:
        UsageError: no record has a label.
        DataError:  the database is damaged.
    """
    with world.together():
        part = _read_share(model, store, world, batch_size, precision, beam, threads, normalize)
    readings = Readings.joined(world.gather(part))
    if not readings.labels:
        folders = ", ".join(database.path for database in store.databases)
        raise shared(  # on every rank
            UsageError(f"{folders}: no record has a label, so nothing can be scored; give a labelled set")
        )
    return readings.score(normalize), readings


def _read_share(
    model: RecognizerLike,
    store: RecordStore,
    world: World,
    batch_size: int,
    precision: Precision,
    beam: int,
    threads: int,
    normalize: Normalize,
) -> Readings:
    """The readings of this rank's batches."""
    use_bf16 = precision == "bf16" or (precision == "auto" and world.device.type == "cuda")
    views = DaliViews(
        batch_size=batch_size,
        threads=threads or default_threads(world.size),
        device=world.device,
        image_size=model.config.encoder.image_size,
        stage=Stage.PLAIN,
    )
    share = _Share()
    try:
        with (
            _evaluation_mode(model),
            torch.no_grad(),
            torch.autocast(world.device.type, torch.bfloat16, enabled=use_bf16),
        ):
            for start in range(world.rank * batch_size, len(store), world.size * batch_size):
                records, images = share.load(store, range(start, min(start + batch_size, len(store))), views)
                if images is not None:
                    reading = model.greedy(images) if beam == 1 else model.beam_search(images, beam)
                    share.add(records, reading)
    finally:
        views.close()
    return share.readings(normalize)


class _Share:
    """What one rank has read so far."""

    def __init__(self) -> None:
        self._labels: dict[int, str] = {}
        self._texts: dict[int, tuple[str, float]] = {}
        self._broken: dict[int, str] = {}
        self._unlabelled = 0

    def load(self, store: RecordStore, records: range, views: DaliViews) -> tuple[list[int], Tensor | None]:
        """Labelled records whose images can be decoded, and these images, (B, H, W, 3) uint8."""
        labels = {index: store.label(index) for index in records}
        labelled = {index: label for index, label in labels.items() if label is not None}
        self._labels |= labelled
        self._unlabelled += len(labels) - len(labelled)
        images = decodable(store.gather(list(labelled), store.max_pixels))
        usable: dict[int, NDArray[np.uint8]] = {}
        for row, (index, verdict) in enumerate(zip(labelled, images.status, strict=True)):
            if verdict == Status.OK:
                usable[index] = images.encoded[row]
            else:
                self._broken[index] = reason_of(verdict, images.encoded[row])
        while usable:
            try:
                return list(usable), views(list(usable.values()), None)[0]
            except BrokenImages as error:
                order = list(usable)
                for row in error.rows:
                    self._broken[order[row]] = UNDECODABLE
                    del usable[order[row]]
        return [], None

    def add(self, records: list[int], reading: ReadingLike) -> None:
        """Note the readings of the loaded images."""
        probabilities = reading.word_probabilities.float().tolist()
        for index, text, probability in zip(records, reading.strings, probabilities, strict=True):
            self._texts[index] = text, probability

    def readings(self, normalize: Normalize) -> Readings:
        """All of them, in the order of the records."""
        indices = sorted(self._labels)
        texts = [self._texts.get(index, ("", 0.0)) for index in indices]
        correct = [
            index in self._texts and is_correct(self._labels[index], text, normalize)
            for index, (text, _) in zip(indices, texts, strict=True)
        ]
        return Readings(
            np.array(indices, dtype=np.int64),
            [self._labels[index] for index in indices],
            [text for text, _ in texts],
            np.array([probability for _, probability in texts], dtype=np.float32),
            np.array(correct, dtype=np.bool_),
            self._broken,
            self._unlabelled,
        )


@contextlib.contextmanager
def _evaluation_mode(model: RecognizerLike) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each has the flag it had."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
