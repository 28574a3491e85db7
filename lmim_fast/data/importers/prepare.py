"""From entries to records: reads, checks, crops and turns, in any thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmim_fast.config import MAX_PIXELS
from lmim_fast.data.importers import images
from lmim_fast.data.importers.entries import Entry, Item, Refused, Reject
from lmim_fast.data.samples import reason_of
from lmim_fast.data.store.probe import Status, probe

BYTES_AT_ONCE = 2**22  # of the images that one task holds, but for the last one: it bounds the memory


@dataclass
class Outcome:
    """What one entry gave."""

    records: list[tuple[bytes, str | None]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """skipped, cropped, ignored, turned, upright, broken: see `summary.Summary`."""
    read: int = 0
    """Bytes of the image."""


@dataclass(frozen=True)
class Preparer:
    """A function of entries: equal ones for equal bytes, whatever thread they are in."""

    turn_vertical: bool
    apply_exif: bool
    keep_broken: bool

    def __call__(self, entries: Sequence[Entry]) -> list[Outcome]:
        """The outcome of each entry, up to the one whose image makes `BYTES_AT_ONCE`: at least of the first.

        Raises:
            DataError: a file that is there cannot be read.
        """
        outcomes: list[Outcome] = []
        read: list[tuple[Outcome, Item, bytes]] = []
        held = 0
        for entry in entries:
            if held >= BYTES_AT_ONCE:
                break
            outcome = Outcome()
            outcomes.append(outcome)
            if isinstance(entry, Reject):
                outcome.rejects.append(entry)
            elif isinstance(entry, Item):
                outcome.rejects.extend(entry.refused)
                outcome.counts["ignored"] += entry.ignored
                try:
                    image = entry.read()
                    outcome.read = len(image)
                    held += len(image)
                    read.append((outcome, entry, image))
                except Refused as refused:
                    outcome.rejects.append(Reject(entry.where, refused.reason, refused.detail))
            else:
                outcome.counts["skipped"] += 1
        status, heights, widths = probe([image for _, _, image in read], images.MAX_PIXELS)
        for (outcome, item, image), verdict, height, width in zip(
            read, status.tolist(), heights.tolist(), widths.tolist(), strict=True
        ):
            self._add(outcome, item, image, Status(verdict), height, width)
        return outcomes

    def _add(
        self, outcome: Outcome, item: Item, image: bytes, status: Status, height: int, width: int
    ) -> None:
        try:
            if status != Status.OK:
                raise Refused(reason_of(status, image))
            if item.boxes is None and height * width > MAX_PIXELS:
                raise Refused("too large")  # as training would
            if item.boxes is None:
                self._add_crop(outcome, image, item.label, height, width)
            else:
                self._add_boxes(outcome, item, image)
        except Refused as refused:
            if self.keep_broken and item.boxes is None:
                outcome.counts["broken"] += 1
                outcome.records.append((image, item.label))
            else:
                outcome.rejects.append(Reject(item.where, refused.reason, refused.detail))

    def _add_crop(self, outcome: Outcome, image: bytes, label: str | None, height: int, width: int) -> None:
        """The image as it is, or turned."""
        orientation = images.orientation(image) if self.apply_exif else 1
        if orientation >= 5:
            height, width = width, height
        vertical = self.turn_vertical and images.is_vertical(height, width, label)
        if orientation != 1 or vertical:
            pixels = images.upright(images.decode(image), orientation)
            image = images.encode(images.turn(pixels) if vertical else pixels, image)
            outcome.counts["upright"] += orientation != 1
            outcome.counts["turned"] += vertical
        outcome.records.append((image, label))

    def _add_boxes(self, outcome: Outcome, item: Item, image: bytes) -> None:
        """One record for each box. Corners are meant on the page as people see it, so EXIF is applied."""
        if not item.boxes:
            return
        orientation = images.orientation(image) if self.apply_exif else 1
        page = images.upright(images.decode(image), orientation)
        outcome.counts["upright"] += orientation != 1
        for number, box in enumerate(item.boxes):
            try:
                pixels = images.rectify(page, box.points)
                height, width = pixels.shape[:2]
                vertical = self.turn_vertical and images.is_vertical(height, width, box.label)
                crop = images.encode(images.turn(pixels) if vertical else pixels, image)
            except Refused as refused:
                outcome.rejects.append(Reject(f"{item.where} box {number}", refused.reason, refused.detail))
                continue
            outcome.counts["turned"] += vertical
            outcome.counts["cropped"] += 1
            outcome.records.append((crop, box.label))
