"""Accuracy, edit distance and their sums over images, test sets and processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rapidfuzz.distance import Levenshtein

Normalize = Callable[[str], str]
"""What a label and a reading become before they are compared: `data.normalize.waics` or `chinese`."""

BUCKETS = (*(str(length) for length in range(11)), "11-15", "16-20", "21+")
"""Lengths of the normalised label; "0" is a label without any character that counts."""


def similarity(label: str, reading: str) -> float:
    """1 - edit distance / length of the longer string; 1 for two empty strings.

    Source: 1-NED of the ICDAR 2019 competitions, one image.
    """
    longer = max(len(label), len(reading))
    return 1.0 if longer == 0 else 1.0 - Levenshtein.distance(label, reading) / longer


def bucket(length: int) -> str:
    """The entry of `BUCKETS` for a label of `length` characters."""
    if length <= 10:
        return str(length)
    if length <= 15:
        return "11-15"
    return "16-20" if length <= 20 else "21+"


@dataclass(frozen=True)
class Tally:
    """Images and how many of them are correct."""

    images: int = 0
    correct: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.images + other.images, self.correct + other.correct)

    @property
    def accuracy(self) -> float:
        """Per cent; NaN without images."""
        return percent(self.correct, self.images)


@dataclass(frozen=True)
class Score:
    """Counts of one or more test sets; scores add up."""

    images: int = 0
    """Labelled images, broken ones included."""
    correct: int = 0
    """Readings equal to their label after normalisation (WAICS, or the Chinese benchmark's)."""
    exact: int = 0
    """Readings equal to their label in every character, with case and symbols."""
    similarity: float = 0.0
    """Sum of `similarity` over the images, of normalised strings; 0 for a broken image."""
    broken: int = 0
    """Images that cannot be decoded: counted, and wrong."""
    unlabelled: int = 0
    """Records without a label: not counted."""
    lengths: dict[str, Tally] = field(default_factory=dict)
    """Bucket of `BUCKETS` -> its images; only buckets with images."""

    def __add__(self, other: Score) -> Score:
        names = [name for name in BUCKETS if name in self.lengths or name in other.lengths]
        return Score(
            self.images + other.images,
            self.correct + other.correct,
            self.exact + other.exact,
            self.similarity + other.similarity,
            self.broken + other.broken,
            self.unlabelled + other.unlabelled,
            {name: self.lengths.get(name, Tally()) + other.lengths.get(name, Tally()) for name in names},
        )

    @property
    def accuracy(self) -> float:
        """Per cent of the images that are correct; NaN without images."""
        return percent(self.correct, self.images)

    @property
    def exact_accuracy(self) -> float:
        """Per cent of the images that are right with case and symbols; NaN without images."""
        return percent(self.exact, self.images)

    @property
    def one_minus_ned(self) -> float:
        """Mean similarity in per cent; NaN without images."""
        return percent(self.similarity, self.images)


def percent(part: float, whole: float) -> float:
    """`part` of `whole` in per cent; NaN of nothing."""
    return 100.0 * part / whole if whole else float("nan")


def is_correct(label: str, reading: str, normalize: Normalize) -> bool:
    """Whether the two are equal after normalisation."""
    return normalize(label) == normalize(reading)


def score_readings(
    labels: list[str], readings: list[str | None], normalize: Normalize, *, unlabelled: int = 0
) -> Score:
    """Count the readings of labelled images.

    Args:
        labels:     of the images.
        readings:   as many; None for an image that cannot be decoded, which is wrong.
        normalize:  makes the strings that are compared and measured.
        unlabelled: records without a label, reported only.
    """
    correct = exact = broken = 0
    total = 0.0
    images: dict[str, list[int]] = {}
    for label, reading in zip(labels, readings, strict=True):
        expected = normalize(label)
        counts = images.setdefault(bucket(len(expected)), [0, 0])
        counts[0] += 1
        if reading is None:
            broken += 1
            continue
        normalized = normalize(reading)
        total += similarity(expected, normalized)
        exact += label == reading
        if expected == normalized:
            correct += 1
            counts[1] += 1
    lengths = {name: Tally(*images[name]) for name in BUCKETS if name in images}
    return Score(len(labels), correct, exact, total, broken, unlabelled, lengths)
