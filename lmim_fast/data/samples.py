"""Reads samples; replaces a broken record by a substitute, a function of (seed, epoch, index)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.decoding import decode
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.png import still_png
from lmim_fast.data.store.gather import EncodedImages, Gathered
from lmim_fast.data.store.probe import Status
from lmim_fast.data.store.rare_formats import described
from lmim_fast.data.store.records import Records
from lmim_fast.errors import DataError, UsageError

UNDECODABLE = "pixel data cannot be decoded"
"""The reason of a record with a good header whose pixel data is damaged."""

_LOG = logging.getLogger(__name__)
_LISTED = 1000  # entries kept and logged; the count goes on
_SETTLED = 200  # records seen before their share of broken ones means much
_ATTEMPTS = 100  # candidates read in place of one record
_PASSED_OVER = 10_000  # candidates known to be broken in a row: nearly all of the records are


class BadRecord(NamedTuple):
    """One broken record."""

    database: str
    key: str
    reason: str


class BadRecords:
    """The broken records that one process met, each once; thread-safe.

    Args:
        store:        names the records.
        max_fraction: `note` and `saw` raise when more than this share of the distinct records seen is broken
            (of the first 200, as long as fewer were seen).
        skipped:      records that are not to be read, with reasons: broken from the start, neither counted
            nor named.
    Raises:
        UsageError: all records are skipped.
    """

    def __init__(self, store: Records, max_fraction: float, skipped: Mapping[int, str] | None = None) -> None:
        self._store, self._max_fraction = store, max_fraction
        self.skipped = dict(skipped or {})
        if len(self.skipped) >= len(store):
            raise UsageError(f"the skip list holds all {len(store)} records; no record is left to train on")
        self._indices: set[int] = set()
        self._substitutes = 0
        self._lock = threading.Lock()
        self.entries: list[BadRecord] = []
        """The first 1,000."""
        self.seen = 0
        """Samples asked for, over all epochs, without those of skipped records."""

    @property
    def count(self) -> int:
        """Distinct broken records."""
        return len(self._indices)

    @property
    def known(self) -> int:
        """Distinct broken and skipped records."""
        return len(self._indices) + len(self.skipped)

    def __contains__(self, index: int) -> bool:
        return index in self._indices or index in self.skipped

    def saw(self, samples: Sequence[int]) -> None:
        """Count samples that were asked for."""
        seen = len(samples)
        if self.skipped:
            seen -= sum(index in self.skipped for index in samples)
        with self._lock:
            self.seen += seen

    def saw_substitute(self) -> None:
        """Count a record that is read in place of a broken one."""
        with self._lock:
            self._substitutes += 1

    def note(self, index: int, reason: str) -> None:
        """Add a record, unless it is known.

        Raises:
            DataError: too many are broken.
        """
        with self._lock:
            if index in self:
                return
            self._indices.add(index)
            if self.count <= _LISTED:
                entry = BadRecord(*self._store.locate(index), reason)
                self.entries.append(entry)
                _LOG.warning("broken record, another one takes its place: %s %s: %s", *entry)
            if self.count == _LISTED + 1:
                _LOG.warning("more than %d broken records: the others are counted, not named", _LISTED)
            total = len(self._store) - len(self.skipped)
            seen = max(min(self.seen + self._substitutes, total), min(_SETTLED, total))
            if self.count > self._max_fraction * seen:
                last = self.entries[-1]
                raise DataError(
                    f"{self.count} of the first {seen} records seen are broken, more than"
                    f" --loader.max-bad-fraction {self._max_fraction:g} allows; the last:"
                    f" {last.database} {last.key}: {last.reason}"
                )


@dataclass
class Samples:
    """Encoded images of B asked-for samples."""

    epochs: NDArray[np.int64]
    indices: NDArray[np.int64]
    """(B,) the samples asked for."""
    sources: list[int]
    """The records that are read for them: their own, or substitutes."""
    attempts: list[int]
    """Substitutes tried so far."""
    encoded: EncodedImages
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]


class SampleReader:
    """Reads samples from a store and substitutes broken records.

    Args:
        store:      records.
        order:      gives the substitutes.
        bad:        where broken records are noted.
        max_pixels: height x width allowed.
        workers:    `lmim_fast._C.Workers` that share the reading of a batch; None: the calling thread alone.
    """

    def __init__(
        self, store: Records, order: SampleOrder, bad: BadRecords, max_pixels: int, workers: Any = None
    ) -> None:
        self._store, self._order, self._max_pixels, self._workers = store, order, max_pixels, workers
        self.bad = bad

    def read(self, epochs: NDArray[np.int64], indices: NDArray[np.int64]) -> Samples:
        """The samples; headers are checked, pixel data is not.

        Raises:
            DataError: too many broken records, or no readable one found.
        """
        sources = indices.tolist()
        attempts = [0] * len(sources)
        self.bad.saw(sources)
        if self.bad.known:
            for row, source in enumerate(sources):
                if source in self.bad:
                    sources[row], attempts[row] = self._candidate(int(epochs[row]), source, 0)
        images = decodable(self._store.gather(sources, self._max_pixels, self._workers))
        samples = Samples(epochs, indices, sources, attempts, images.encoded, images.heights, images.widths)
        for row in np.flatnonzero(images.status != Status.OK).tolist():
            self.replace(samples, row, reason_of(images.status[row], images.encoded[row]))
        if self.bad.count:
            for row, source in enumerate(samples.sources):
                if source in self.bad:
                    self.replace(samples, row, "")
        return samples

    def close(self) -> None:
        """Let go of the workers; the calling thread reads alone from now on."""
        self._workers = None

    def replace(self, samples: Samples, row: int, reason: str) -> None:
        """Mark the record in `row` as broken and put the next good candidate there."""
        self.bad.note(samples.sources[row], reason)
        epoch, index = int(samples.epochs[row]), int(samples.indices[row])
        for _ in range(_ATTEMPTS):
            candidate, samples.attempts[row] = self._candidate(epoch, index, samples.attempts[row])
            image = decodable(self._store.gather([candidate], self._max_pixels))
            if image.status[0] == Status.OK:
                samples.sources[row] = candidate
                samples.encoded.put(row, image.encoded[0])
                samples.heights[row], samples.widths[row] = image.heights[0], image.widths[0]
                return
            self.bad.note(candidate, reason_of(image.status[0], image.encoded[0]))
        raise self._nothing_readable(index, _ATTEMPTS)

    def _candidate(self, epoch: int, index: int, attempt: int) -> tuple[int, int]:
        """The first candidate from `attempt` on that is not known to be broken, and the attempt after it."""
        tries = _PASSED_OVER if self.bad.known < len(self._store) else 0
        for number in range(attempt, attempt + tries):
            candidate = self._order.substitute(epoch, index, number)
            if candidate not in self.bad:
                self.bad.saw_substitute()
                return candidate, number + 1
        raise self._nothing_readable(index, attempt + tries)

    def _nothing_readable(self, index: int, tried: int) -> DataError:
        database, key = self._store.locate(index)
        return DataError(
            f"no readable record among {tried} candidates to stand in for {database} {key}:"
            f" {self.bad.known} of {len(self._store)} records are broken or skipped"
        )


def decodable(images: Gathered) -> Gathered:
    """What was gathered as DALI can decode it, changed in place: all but JPEG, PNG and WebP become BMP.

    DALI does not read GIFs and others, and a BMP whose palette is damaged can crash it. An animated PNG
    becomes its still image, or is refused where it is damaged (see `still_png`).
    """
    good = np.flatnonzero(images.status == Status.OK)
    starts = images.encoded.offsets[good]
    first, second = images.encoded.arena[starts], images.encoded.arena[starts + 1]
    is_jpeg = (first == 0xFF) & (second == 0xD8)
    for row in good[~(is_jpeg | (first == 0x89) | (first == ord("R")))].tolist():
        pixels = decode(images.encoded[row])
        # More pixels than the header says: it says something else to OpenCV.
        if pixels is None or pixels.size > 3 * int(images.heights[row]) * int(images.widths[row]):
            images.status[row] = Status.UNDECODABLE
            continue
        images.heights[row], images.widths[row] = pixels.shape[:2]
        images.encoded.put(row, cv2.imencode(".bmp", pixels)[1].reshape(-1))
    for row in good[first == 0x89].tolist():
        png = images.encoded[row].tobytes()
        still = still_png(png)
        if still is None:
            images.status[row] = Status.UNDECODABLE
        elif still is not png:
            images.encoded.put(row, np.frombuffer(still, np.uint8))
    return images


def reason_of(status: int, image: NDArray[np.uint8] | bytes) -> str:
    """What a `Status` other than OK is called in reports, with the format where no decoder is for it."""
    if status == Status.UNDECODABLE:
        return UNDECODABLE
    known = described(bytes(image)) if status in (Status.NOT_AN_IMAGE, Status.UNSUPPORTED) else None
    return known or Status(status).name.lower().replace("_", " ")
