import math
import random

import pytest
from evaluation_sets import distance

from lmim_fast.data.normalize import chinese, waics
from lmim_fast.evaluation.confusions import align, confusions
from lmim_fast.evaluation.metrics import BUCKETS, Score, Tally, bucket, score_readings, similarity


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello", "hello"),
        ("IT'S 5%!", "its5"),
        ("", ""),
        ("...", ""),
        ("caf\u00e9", "caf"),
        ("\u212a9", "9"),  # the Kelvin sign is no ASCII letter, though its lower case is
        ("a b\tc", "abc"),
    ],
)
def test_waics_keeps_lower_case_letters_and_digits(text, expected):
    assert waics(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u6f22\u5b57", "\u6c49\u5b57"),  # traditional -> simplified
        ("\uff21\uff22\uff11", "ab1"),  # full width
        ("A b\u3000C", "abc"),  # spaces, the ideographic one too
        ("\u6c49-\u5b57!", "\u6c49-\u5b57!"),  # symbols stay
        ("", ""),
    ],
)
def test_chinese_ignores_width_script_case_and_spaces(text, expected):
    assert chinese(text) == expected


def test_similarity_is_one_minus_the_edit_distance_over_the_longer_length():
    draw = random.Random(0)
    for _ in range(300):
        left, right = ("".join(draw.choices("abc", k=draw.randrange(7))) for _ in range(2))
        longer = max(len(left), len(right))
        expected = 1 - distance(left, right) / longer if longer else 1
        assert similarity(left, right) == pytest.approx(expected, abs=1e-12)
    assert similarity("", "") == 1
    assert similarity("", "ab") == 0


def test_scores_count_what_the_readings_say():
    labels = ["Hello", "WORLD", "it's", "abcd", "!!", "broken"]
    readings = ["hello", "WORLD", "its", "abxd", "", None]
    score = score_readings(labels, readings, waics, unlabelled=2)
    assert (score.images, score.correct, score.exact) == (6, 4, 1)
    assert score.similarity == pytest.approx(1 + 1 + 1 + 0.75 + 1)
    assert (score.broken, score.unlabelled) == (1, 2)
    assert score.lengths == {
        "0": Tally(1, 1),
        "3": Tally(1, 1),
        "4": Tally(1, 0),
        "5": Tally(2, 2),
        "6": Tally(1, 0),
    }
    assert score.accuracy == pytest.approx(400 / 6)
    assert score.exact_accuracy == pytest.approx(100 / 6)
    assert score.one_minus_ned == pytest.approx(475 / 6)


def test_a_broken_image_with_an_empty_label_is_wrong_too():
    score = score_readings(["?"], [None], waics)
    assert (score.images, score.correct, score.exact, score.similarity) == (1, 0, 0, 0.0)


def test_scores_of_parts_add_up_to_the_score_of_the_whole():
    labels = ["a" * length for length in (1, 3, 3, 10, 11, 15, 16, 20, 21, 40)]
    readings = [None if length % 3 == 0 else "a" * length for length in map(len, labels)]
    whole = score_readings(labels, readings, waics, unlabelled=3)
    parts = [
        score_readings(labels[:4], readings[:4], waics, unlabelled=1),
        score_readings(labels[4:], readings[4:], waics, unlabelled=2),
    ]
    assert sum(parts, Score()) == whole
    assert list(whole.lengths) == ["1", "3", "10", "11-15", "16-20", "21+"]


def test_every_length_has_its_bucket():
    assert [bucket(length) for length in (0, 1, 10, 11, 15, 16, 20, 21, 99)] == [
        "0", "1", "10", "11-15", "11-15", "16-20", "16-20", "21+", "21+",
    ]  # fmt: skip
    assert {bucket(length) for length in range(50)} == set(BUCKETS)


def test_nothing_has_no_accuracy():
    assert math.isnan(Score().accuracy)
    assert math.isnan(Tally().accuracy)


def test_alignment_names_substitutions_insertions_and_deletions():
    assert align("cat", "cut") == [("c", "c"), ("a", "u"), ("t", "t")]
    assert align("ab", "abc") == [("a", "a"), ("b", "b"), ("", "c")]
    assert align("abc", "ac") == [("a", "a"), ("b", ""), ("c", "c")]
    assert align("HELLO", "ello", str.lower) == [("H", ""), ("E", "e"), ("L", "l"), ("L", "l"), ("O", "o")]


def test_confusions_are_the_edits_between_labels_and_readings():
    draw = random.Random(1)
    pairs = [tuple("".join(draw.choices("ab", k=draw.randrange(6))) for _ in range(2)) for _ in range(50)]
    counts = confusions(pairs)
    assert sum(counts.values()) == sum(distance(left, right) for left, right in pairs)
    assert not any(label == reading for label, reading in counts)
    assert confusions([("o1o", "01"), ("o", "0")]) == {("o", "0"): 2, ("o", ""): 1}
