"""Text normalisation: hand-made cases."""

# ruff: noqa: RUF001 - full width and curly characters are what is tested

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmim_fast.data.charset import Charset
from lmim_fast.data.normalize import chinese, normalize_label, waics

ASCII, LOWER = Charset.named("94"), Charset.named("36")
CHINESE = Charset("中国书a1，。“”( ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello", "hello"),
        ("It's 5:30-PM!", "its530pm"),
        ("", ""),
        ("!?", ""),
        ("a b\tc", "abc"),
        ("Café", "caf"),
        ("ＡＢ１", ""),
        ("_x_", "x"),
        ("\u212a", ""),  # the Kelvin sign lower-cases to k, but is no ASCII letter
    ],
)
def test_waics_keeps_ascii_letters_and_digits_in_lower_case(text, expected):
    assert waics(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("漢字", "汉字"),
        ("汉字", "汉字"),
        ("ＡＢＣ１２３", "abc123"),
        ("（中）！", "(中)!"),
        ("中 国\u3000人\u00a0", "中国人"),
        ("Hello 世界", "hello世界"),
        ("", ""),
        ("   ", ""),
        ("①㎏", "1kg"),
        ("計算機", "计算机"),
        ("計程車", "计程车"),  # characters are simplified, words stay
        ("cafe\u0301", "caf\u00e9"),
        ("，。、", ",。、"),
    ],
)
def test_chinese_is_compatible_simplified_lower_case_without_spaces(text, expected):
    assert chinese(text) == expected


@given(st.text())
def test_normalised_text_stays_as_it_is(text):
    assert waics(waics(text)) == waics(text)


@pytest.mark.parametrize(
    ("charset", "text", "expected"),
    [
        (ASCII, "Hello!", "Hello!"),
        (ASCII, "", ""),
        (ASCII, "Ｈｅｌｌｏ！", "Hello!"),
        (ASCII, "it’s “so” – yes", 'it\'s "so" - yes'),
        (ASCII, "ﬁn…", "fin..."),
        (ASCII, "Café", "Cafe"),
        (ASCII, "Cafe\u0301", "Cafe"),
        (ASCII, "½", "1/2"),
        (ASCII, "中文", "中文"),  # no equivalent: as it is
        (ASCII, "中\u0301", "中\u0301"),
        (ASCII, "a b", "a b"),  # a space has no equivalent in the set and is not deleted
        (ASCII, "\u0301", "\u0301"),
        (LOWER, "ＡＢ", "AB"),  # the set folds the case when it encodes
        (LOWER, "É", "E"),
        (CHINESE, "中國書", "中国书"),
        (CHINESE, "“中”，。", "“中”，。"),  # the set has them: untouched, though NFKC would change them
        (CHINESE, "（中,", "(中，"),
        (CHINESE, "中\u3000国", "中 国"),
        (Charset("國国"), "國国", "國国"),
        (Charset("caféE"), "cafe\u0301", "café"),
        (Charset("cafe\u0301"), "cafe\u0301", "cafe\u0301"),
        (Charset("cafe\u0301"), "caf\u0301e", "caf\u0301e"),
    ],
)
def test_labels_take_equivalents_for_what_the_set_lacks(charset, text, expected):
    assert normalize_label(text, charset) == expected


@given(st.text(), st.sampled_from([ASCII, LOWER, CHINESE]))
def test_no_label_loses_a_character_of_the_set_and_normalising_twice_is_once(text, charset):
    normalized = normalize_label(text, charset)
    assert normalize_label(normalized, charset) == normalized
    assert len(charset.outside(normalized)) <= len(charset.outside(text))
    left = iter(normalized)
    assert all(c in left for c in text if charset.holds(c) and c.isascii())


def test_the_converter_loads_without_a_warning():
    code = "from lmim_fast.data.normalize import chinese; assert chinese('漢') == '汉'"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
