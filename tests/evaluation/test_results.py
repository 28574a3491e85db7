import math
from pathlib import Path

import numpy as np
import pytest

from lmim_fast.evaluation.layouts import DATASETS, TestSet
from lmim_fast.evaluation.metrics import Score
from lmim_fast.evaluation.published import PUBLISHED, published_rows
from lmim_fast.evaluation.results import Result, averages, in_percent
from lmim_fast.evaluation.scoring import Readings


def result(name, records, correct, benchmark="plain", dataset=None):
    none = np.zeros(0)
    readings = Readings(none, [], [], none, none, {}, 0)
    test_set = TestSet(name, Path(name), benchmark, dataset)
    return Result(test_set, records, Score(images=records, correct=correct), readings)


def test_avg_is_over_sets_and_w_avg_over_images():
    (row,) = averages([result("a", 100, 50), result("b", 300, 300)])
    assert (row.average, row.weighted, row.images) == (75.0, 87.5, 400)
    assert row.names == ("a", "b")


def test_a_benchmark_s_average_says_how_many_of_its_sets_and_which_splits():
    rows = averages(
        [
            result("SVT", 647, 647, "six", "SVT"),
            result("mine", 10, 0),
            result("IC13", 857, 0, "six", "IC13"),
        ]
    )
    assert [row.title for row in rows] == ["six, 2 of 6 sets (SVT-647, IC13-857)"]
    assert rows[0].average == 50


def test_an_average_takes_one_split_of_a_dataset():
    rows = averages(
        [
            result("IC13_857", 857, 857, "six", "IC13"),
            result("IC13_1015", 1015, 0, "six", "IC13"),
            result("SVT", 647, 0, "six", "SVT"),
        ]
    )
    assert [row.names for row in rows] == [("IC13_1015", "SVT"), ("IC13_857", "SVT")]
    assert [row.average for row in rows] == [0, 50]


def test_sets_of_other_names_stay_out_of_the_chinese_average():
    rows = averages(
        [
            result("scene", 10, 10, "chinese", "scene"),
            result("web", 10, 5, "chinese", "web"),
            result("mine", 10, 0, "chinese"),
        ]
    )
    assert [(row.title, row.average) for row in rows] == [("chinese, 2 of 4 sets", 75.0)]


def test_one_set_has_no_average():
    assert averages([result("a", 10, 5)]) == []


def test_published_averages_are_the_means_of_their_sets():
    complete = [row for row in PUBLISHED if row.sets]
    assert len(complete) == 5
    for row in complete:
        assert list(row.sets) == list(DATASETS[row.benchmark])
        # Rounded figures, averaged and rounded again.
        assert sum(row.sets.values()) / len(row.sets) == pytest.approx(row.average, abs=0.11)
    assert {row.labels for row in published_rows("six")} == {
        "corrected labels, IC13-1015, IC15-2077",
        "original labels, IC13-1015, IC15-2077",
    }
    assert published_rows("plain") == []


def test_the_published_weighted_averages_are_those_of_the_larger_splits():
    images = {"IIIT5K": 3000, "IC13": 1015, "SVT": 647, "IC15": 2077, "SVTP": 645, "CUTE80": 288}
    for row in published_rows("six"):
        mean = sum(images[name] * value for name, value in row.sets.items()) / sum(images.values())
        assert mean == pytest.approx(row.weighted, abs=0.1)


def test_percent_signs_stand_behind_values_in_percent():
    assert in_percent(100 * 7 / 8) == "87.5%"
    assert in_percent(None) == in_percent(math.nan) == "-"
