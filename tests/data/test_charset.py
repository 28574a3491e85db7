"""Character sets: class numbers, text to classes and back, files with one character a line."""

import pickle
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmim_fast.config import RecognizerConfig
from lmim_fast.data.charset import Charset, shared_classes
from lmim_fast.errors import UsageError

CHINESE = "中文字a1 。"


def test_the_classes_are_those_of_the_released_english_model():
    charset = Charset.named("94")
    config = RecognizerConfig(classes=charset.classes)
    assert charset.characters == string.digits + string.ascii_letters + string.punctuation
    assert (charset.eos, charset.pad, charset.unknown, charset.start) == (94, 95, 96, 97)
    assert (charset.eos, charset.pad, charset.unknown, charset.start, len(charset)) == (
        config.eos,
        config.pad,
        config.unknown,
        config.start,
        config.characters,
    )


@given(st.sampled_from([Charset.named("62"), Charset.named("94"), Charset(CHINESE)]), st.data())
def test_a_label_of_the_set_survives_encoding_and_decoding(charset, data):
    label = data.draw(st.text(charset.characters))
    assert charset.decode([*charset.encode(label), charset.eos, charset.pad, 0]) == label
    assert charset.decode(charset.encode(label)) == label


@given(st.text())
def test_every_label_encodes_to_one_class_a_character_and_outsiders_decode_to_u_fffd(label):
    for charset in (Charset.named("36"), Charset(CHINESE)):
        ids = charset.encode(label)
        assert len(ids) == len(label)
        assert all(0 <= number < charset.eos or number == charset.unknown for number in ids)
        decoded = charset.decode(ids)
        assert decoded.count("\ufffd") == ids.count(charset.unknown) == len(charset.outside(label))
        assert charset.holds(label) == ("\ufffd" not in decoded)


def test_a_set_without_capitals_reads_text_without_case_and_others_do_not():
    assert Charset.named("36").encode("aB9") == Charset.named("36").encode("Ab9") == [10, 11, 9]
    assert Charset.named("62").encode("aB") == [10, 37]
    assert Charset("ABC").encode("aB") == [5, 1]
    assert Charset("中1").encode("A") == [4]  # no letters at all: nothing to fold
    assert Charset("abⅣⅳ").encode("AⅣ") == [0, 3]  # a Roman numeral is no capital letter


def test_nothing_before_eos_is_skipped_and_nothing_behind_it_is_read():
    charset = Charset("ab")
    assert charset.decode([0, charset.unknown, charset.pad, 1, charset.eos, 0]) == "a\ufffd\ufffdb"
    assert charset.decode([]) == ""
    for number in (-1, charset.start):
        with pytest.raises(ValueError, match=f"got {number}"):
            charset.decode([number])


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        ("", "empty"),
        ("aba", r"'a' \(U\+0061 LATIN SMALL LETTER A\) 2 times"),
        ("a\tb", "control character"),
        ("a\nb", "control character"),
        ("a\u2028", "line break"),
        ("a\ufffd", "stands for unknown"),
        ("a\ufeff", "byte order mark"),
        ("a \u3000", r"2 kinds of space .*IDEOGRAPHIC SPACE"),
    ],
)
def test_what_cannot_be_a_set_is_refused_with_the_character(characters, message):
    with pytest.raises(UsageError, match=message):
        Charset(characters)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_a_file_has_one_character_a_line_with_any_line_ending(tmp_path, ending, start, last):
    path = tmp_path / "set.txt"
    text = start + ending.join(CHINESE) + (ending if last else "")
    path.write_bytes(text.encode())
    assert Charset.named(str(path)) == Charset.named(path) == Charset(CHINESE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "file is empty"),
        (b"a\n\nb\n", "line 2: empty"),
        (b"a\nb\n\n", "line 3: empty"),
        (b"a\nbc\n", "line 2: 'bc' has 2 characters"),
        (b"a\nb\nc\nb\n", "'b' .*on line 2 and again on line 4"),
        (b"a\n\xff\n", "line 2: not UTF-8"),
        (b"a\n\t\n", "line 2: .*control character"),
        (b"a\n \n\xe3\x80\x80\n", "2 kinds of space"),
        (b"a\n\xef\xbf\xbd\n", "line 2: .*stands for unknown"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_line(tmp_path, content, message):
    path = tmp_path / "set.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        Charset.named(path)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_file_says_what_there_is(tmp_path):
    with pytest.raises(UsageError, match=r"'37' cannot be read .*36, 62, 94 or a file"):
        Charset.named("37")
    with pytest.raises(UsageError, match="cannot be read"):
        Charset.named(tmp_path)


def test_the_fingerprint_tells_sets_and_orders_apart_and_nothing_else():
    sets = [Charset.named("36"), Charset.named("62"), Charset("ab"), Charset("ba")]
    assert len({charset.fingerprint() for charset in sets}) == 4
    assert Charset("ab").fingerprint() == Charset("ab").fingerprint()
    assert len(Charset("ab").fingerprint()) == 16


def test_a_set_survives_pickling_after_use():
    charset = Charset(CHINESE)
    charset.encode("中")
    assert pickle.loads(pickle.dumps(charset)) == charset
    assert pickle.loads(pickle.dumps(charset)).encode("中") == [0]


def test_shared_pairs_join_the_same_characters_and_the_same_special_classes():
    old, new = Charset("abcd"), Charset("xcab1")
    assert shared_classes(old, new) == [(2, 1), (0, 2), (1, 3), (4, 5), (5, 6), (6, 7)]
    assert shared_classes(old, old) == [(number, number) for number in range(old.classes)]
    english, large = Charset.named("36"), Charset.named("94")
    assert len(shared_classes(english, large)) == len(shared_classes(large, english)) == 36 + 3
