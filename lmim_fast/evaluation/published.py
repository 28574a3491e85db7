"""Published results, in per cent, with the splits and label sets that they are of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Benchmark = Literal["six", "union14m", "chinese", "plain"]


@dataclass(frozen=True)
class Published:
    """One row of a paper's table: word accuracy in per cent."""

    method: str
    benchmark: Benchmark
    labels: str
    """Label set and splits that the row is of."""
    average: float
    """Mean over the sets."""
    weighted: float | None = None
    """Mean over the images, where the paper gives it."""
    sets: dict[str, float] = field(default_factory=dict)
    """Dataset (`layouts.DATASETS`) -> accuracy; empty where only the average is known."""
    ablation: bool = False
    """Whether the row is of the paper's ablation study, trained for less."""


_SIX = ("IIIT5K", "IC13", "SVT", "IC15", "SVTP", "CUTE80")
_UNION14M = ("curve", "multi_oriented", "artistic", "contextless", "salient", "multi_words", "general")
_CHINESE = ("scene", "web", "document", "handwriting")
_SPLITS = "IC13-1015, IC15-2077"


def _union14m(method: str, average: float, *values: float, ablation: bool = False) -> Published:
    sets = dict(zip(_UNION14M, values, strict=True)) if values else {}
    return Published(method, "union14m", "Union14M-Benchmark", average, None, sets, ablation)


def _six(labels: str, average: float, weighted: float, *values: float) -> Published:
    sets = dict(zip(_SIX, values, strict=True))
    return Published("LMIM", "six", f"{labels} labels, {_SPLITS}", average, weighted, sets)


PUBLISHED = (
    _six("corrected", 97.0, 96.7, 99.3, 98.1, 98.3, 91.7, 95.4, 99.3),
    _six("original", 95.9, 95.3, 98.5, 98.0, 97.7, 88.7, 94.0, 98.6),
    _union14m("LMIM, 20 epochs", 86.3, 90.3, 86.6, 80.7, 85.5, 88.2, 87.9, 85.1),
    _union14m("LMIM, 10 epochs", 84.7, 87.5, 84.5, 79.8, 84.3, 86.6, 86.1, 84.4),
    _union14m("MIM alone", 80.3),
    _union14m("SeqCLR", 80.7),
    _union14m("MAERec-S", 78.6),
    _union14m("LMIM, no guidance", 77.7, ablation=True),
    _union14m("LMIM, guidance, no alignment", 80.6, ablation=True),
    _union14m("LMIM, guidance and alignment", 81.2, ablation=True),
    _union14m("LMIM, targets: pixels", 76.4, ablation=True),
    _union14m("LMIM, targets: features of a random network", 71.5, ablation=True),
    _union14m("LMIM, targets: features of MAE", 81.2, ablation=True),
    _union14m("LMIM, decoder with cross- before self-attention", 80.2, ablation=True),
    _union14m("LMIM, mask ratio 0.6", 79.1, ablation=True),
    _union14m("LMIM, mask ratio 0.8", 81.2, ablation=True),
    _union14m("LMIM, mask ratio 0.9", 80.4, ablation=True),
    Published(
        "LMIM",
        "chinese",
        "Chinese text recognition benchmark",
        82.2,
        85.5,
        dict(zip(_CHINESE, (83.6, 82.0, 99.1, 63.9), strict=True)),
    ),
)


def published_rows(benchmark: Benchmark) -> list[Published]:
    """The published rows of one benchmark; none of plain sets."""
    return [row for row in PUBLISHED if row.benchmark == benchmark]
