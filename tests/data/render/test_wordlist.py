"""Word lists: weights, several files, and what is left out or refused."""

from collections import Counter

import numpy as np
import pytest
from rendering import word_file

from lmim_fast.data.render.wordlist import read_words
from lmim_fast.errors import UsageError


def write(path, text):
    path.write_bytes(text.encode())
    return str(path)


def draws(words, count=4000):
    return Counter(words.draw(np.random.default_rng(seed)) for seed in range(count))


def test_words_come_as_often_as_their_weights_say(tmp_path):
    words, _ = read_words([word_file(tmp_path, "rare\t0.5", "plain", "often\t6.5")], 25)
    found = draws(words)
    assert {word: found[word] / 4000 for word in words} == pytest.approx(
        {"rare": 1 / 16, "plain": 1 / 8, "often": 13 / 16}, abs=0.03
    )


def test_words_without_weights_are_equally_likely_and_a_repeated_one_counts_again(tmp_path):
    words, _ = read_words([word_file(tmp_path, "one", "two", "two")], 25)
    assert words.cumulative is None
    assert draws(words)["two"] / 4000 == pytest.approx(2 / 3, abs=0.03)


def test_several_files_are_one_list(tmp_path):
    first = write(tmp_path / "first", "\ufeffone\r\n\r\n  two  \n")
    second = write(tmp_path / "second", "\u4e2d\u6587 \t 3\nthree")
    words, digest = read_words([first, second], 25)
    assert list(words) == ["one", "two", "\u4e2d\u6587", "three"]
    assert [words[place] for place in range(len(words))] == list(words)
    assert words.characters() == set("onetwthr\u4e2d\u6587")
    assert words.cumulative.tolist() == [1, 2, 5, 6]
    assert read_words([second, first], 25)[1] != digest


def test_words_that_are_too_long_are_left_out_and_counted(tmp_path):
    said = []
    words, _ = read_words([word_file(tmp_path, "short", "muchlonger", "evenlonger")], 6, said.append)
    assert list(words) == ["short"]
    assert said == ["left out: 2 words longer than 6 characters (max_length)"]


def test_kept_words_keep_their_weights(tmp_path):
    words, _ = read_words([word_file(tmp_path, "a\t2", "\u00e9\u00e9", "ccc\t5")], 25)
    some = words.where(np.array([True, False, True]))
    assert list(some) == ["a", "ccc"]
    assert some.cumulative.tolist() == [2, 7]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "many", "1e300", "1\t2"])
def test_a_wrong_weight_is_named_with_its_line(tmp_path, weight):
    with pytest.raises(
        UsageError, match=r"words\.txt, line 2: the weight of a word must be a positive number"
    ):
        read_words([word_file(tmp_path, "fine\t1", f"word\t{weight}")], 25)


def test_a_long_list_takes_about_as_much_memory_as_its_file(tmp_path):
    lines = [f"word{number}" for number in range(50_000)]
    path = word_file(tmp_path, *lines)
    words, _ = read_words([path], 25)
    held = words.text.nbytes + words.ends.nbytes
    assert held < 9 * len(lines) + (tmp_path / "words.txt").stat().st_size
    assert words[31_415] == "word31415"
    assert list(words) == lines
