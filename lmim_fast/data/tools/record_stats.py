"""What `lmim data stats` counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.tools.words import PERCENTILES, character_class


@dataclass(frozen=True)
class Stats:
    """What all records of a store are; sizes are of the records whose header is good."""

    paths: tuple[str, ...]
    """Of the databases."""
    records: int
    heights: NDArray[np.int32]
    """(good records,) pixels."""
    widths: NDArray[np.int32]
    sizes: NDArray[np.int64]
    """(records,) bytes of the encoded images; 0 for none."""
    formats: dict[str, int]
    """Format -> records, most frequent first; "other" for bytes that start like no known format."""
    broken: dict[str, int]
    """Reason -> records with a bad header. Pixel data is not decoded here."""
    label_lengths: NDArray[np.int32]
    """(labels,) characters."""
    characters: dict[str, int]
    """Character -> occurrences in labels, most frequent first."""
    distinct_images: int
    """Images with different bytes."""

    @property
    def aspect_ratios(self) -> NDArray[np.float64]:
        """(good records,) width over height."""
        return self.widths / self.heights

    @property
    def images(self) -> int:
        """Records that hold any bytes."""
        return int(np.count_nonzero(self.sizes))

    @property
    def duplicates(self) -> int:
        """Records whose image has the bytes of another one before it."""
        return self.images - self.distinct_images

    @property
    def classes(self) -> dict[str, int]:
        """Class of character -> occurrences, most frequent first."""
        classes: Counter[str] = Counter()
        for character, occurrences in self.characters.items():
            classes[character_class(character)] += occurrences
        return dict(classes.most_common())

    def as_json(self) -> dict[str, Any]:
        """stats.json."""
        lengths, counts = np.unique(self.label_lengths, return_counts=True)
        return {
            "format": 1,
            "databases": list(self.paths),
            "records": self.records,
            "formats": self.formats,
            "broken_headers": self.broken,
            "height": _spread(self.heights),
            "width": _spread(self.widths),
            "aspect_ratio": _spread(self.aspect_ratios),
            "bytes": _spread(self.sizes) | {"sum": int(self.sizes.sum())},
            "distinct_images": self.distinct_images,
            "duplicates": self.duplicates,
            "labels": len(self.label_lengths),
            "label_length": _spread(self.label_lengths),
            "label_lengths": dict(zip(map(str, lengths.tolist()), counts.tolist(), strict=True)),
            "character_classes": self.classes,
            "distinct_characters": len(self.characters),
            "characters": self.characters,
        }


def percentiles(values: NDArray[Any]) -> tuple[Any, ...]:
    """Values at PERCENTILES; empty without values."""
    if not len(values):
        return ()
    return tuple(np.percentile(values, PERCENTILES, method="nearest").tolist())


def _spread(values: NDArray[Any]) -> dict[str, float]:
    """Percentiles and mean, JSON-ready; empty without values."""
    if not len(values):
        return {}
    names = ("least", *(f"p{percentile}" for percentile in PERCENTILES[1:-1]), "most")
    return dict(zip(names, percentiles(values), strict=True)) | {"mean": float(values.mean())}
