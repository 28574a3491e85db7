"""Scores of several test sets, their averages, and both as a JSON document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmim_fast.data.normalize import waics
from lmim_fast.evaluation.layouts import DATASETS, SPLITS, TestSet
from lmim_fast.evaluation.metrics import Score
from lmim_fast.evaluation.published import Published
from lmim_fast.evaluation.scoring import Readings

LABELS_AS_FOUND = "labels as found in the LMDBs (original or corrected: the data does not say)"


@dataclass(frozen=True)
class Result:
    """What one test set came to."""

    test_set: TestSet
    records: int
    """Records of its databases."""
    score: Score
    readings: Readings

    @property
    def split(self) -> str:
        """Benchmark split by the number of records; "" for a plain set."""
        return self.test_set.split(self.records)


@dataclass(frozen=True)
class Average:
    """Means of some test sets, in per cent."""

    title: str
    """Which sets: benchmark, how many of its sets, splits."""
    names: tuple[str, ...]
    average: float
    """Avg: over the sets, each counted alike."""
    weighted: float
    """W-Avg: over the images."""
    images: int


def averages(results: Sequence[Result]) -> list[Average]:
    """The averages of every benchmark that has results, and of the plain sets; none of a single set.

    Sets of other names under `--layout chinese` are no part of the benchmark, nor of its average. Where a
    dataset is there in two splits (IC13-1015 and IC13-857), each average takes one of them: the
    larger ones, then the smaller ones.
    """
    rows: list[Average] = []
    for benchmark in (*DATASETS, "plain"):
        group = [
            result
            for result in results
            if result.test_set.benchmark == benchmark
            and (benchmark == "plain" or result.test_set.dataset is not None)
        ]
        for choice in _choices(group):
            if len(choice) > 1:
                rows.append(_average(choice, benchmark))
    return rows


def _choices(group: list[Result]) -> list[list[Result]]:
    """The group with one split of each dataset: once, or with the larger and with the smaller splits."""
    named = [result.test_set.dataset for result in group if result.test_set.dataset is not None]
    if len(named) == len(set(named)):
        return [group]
    chosen: list[list[Result]] = []
    for prefer in (max, min):
        taken: dict[str, Result] = {}
        for result in group:
            key = result.test_set.dataset or result.test_set.name
            other = taken.get(key, result)
            taken[key] = prefer(other, result, key=lambda entry: entry.records)
        chosen.append(list(taken.values()))
    return chosen


def _average(group: list[Result], benchmark: str) -> Average:
    total = sum((result.score for result in group), Score())
    mean = sum(result.score.accuracy for result in group) / len(group)
    if benchmark == "plain":
        title = f"{len(group)} sets"
    else:
        complete = len(DATASETS[benchmark])
        title = f"{benchmark}, {len(group)} of {complete} sets"
        splits = [result.split for result in group if result.test_set.dataset in SPLITS]
        if splits:
            title += f" ({', '.join(splits)})"
    return Average(title, tuple(r.test_set.name for r in group), mean, total.accuracy, total.images)


def document(
    results: Sequence[Result], published: Sequence[Published], facts: dict[str, Any]
) -> dict[str, Any]:
    """All numbers, JSON-ready: `facts` (model, settings), sets, averages, published rows."""
    return {
        **facts,
        "labels": LABELS_AS_FOUND,
        "sets": [_set_document(result) for result in results],
        "averages": [
            {
                "title": row.title,
                "sets": list(row.names),
                "average": row.average,
                "weighted_average": row.weighted,
                "images": row.images,
            }
            for row in averages(results)
        ],
        "published": [
            {
                "published": True,
                "method": row.method,
                "benchmark": row.benchmark,
                "labels": row.labels,
                "sets": row.sets,
                "average": row.average,
                "weighted_average": row.weighted,
                "ablation": row.ablation,
            }
            for row in published
        ],
    }


def _set_document(result: Result) -> dict[str, Any]:
    score, test_set = result.score, result.test_set
    rule = "waics" if test_set.normalize is waics else "chinese"
    return {
        "name": test_set.name,
        "path": str(test_set.path),
        "benchmark": test_set.benchmark,
        "dataset": test_set.dataset,
        "split": result.split,
        "normalization": rule,
        "images": score.images,
        "correct": score.correct,
        "accuracy": score.accuracy,
        "exact": score.exact,
        "exact_accuracy": score.exact_accuracy,
        "one_minus_ned": score.one_minus_ned,
        "unlabelled": score.unlabelled,
        "broken": [{"index": index, "reason": why} for index, why in result.readings.broken.items()],
        "lengths": {
            name: {"images": tally.images, "correct": tally.correct, "accuracy": tally.accuracy}
            for name, tally in score.lengths.items()
        },
    }


def in_percent(value: float | None) -> str:
    """97.04 -> "97.0%"; a dash for what is not known."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}%"
