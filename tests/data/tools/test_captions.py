"""Captions: every character is drawn or named, and no control character gets through."""

import warnings

import numpy as np
import pytest

from lmim_fast.data.tools import captions
from lmim_fast.data.tools.captions import caption
from lmim_fast.data.visible import visible


def test_control_characters_become_code_points_and_words_stay():
    assert visible("a\x1b[31m\nb\u2028c\u202ed") == "a\\x1b[31m\\x0ab\\u2028c\\u202ed"
    assert visible("Exit 中文 Ναί é") == "Exit 中文 Ναί é"


@pytest.fixture
def only_dejavu(monkeypatch):
    """A machine without fonts: the one that comes with matplotlib is left."""
    monkeypatch.setattr(captions, "_FOLDERS", ())
    captions._font_files.cache_clear()
    yield
    captions._font_files.cache_clear()


def test_what_no_font_has_is_drawn_as_its_code_point_without_a_warning(only_dejavu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = caption("a中", 200)
        assert np.array_equal(drawn, caption("a\\u4e2d", 200))
        assert not np.array_equal(drawn, caption("a\\u4e2e", 200))
        caption("\U0010ffff\x00\ud800", 200)


def test_a_line_that_is_too_long_ends_in_dots_inside_its_width(only_dejavu):
    drawn = caption("word " * 50, 100)
    assert drawn.shape == (19, 100, 3)
    assert np.array_equal(drawn, caption("word " * 60, 100))
    assert (drawn[:, -8:] < 255).any() or (drawn[:, -20:] < 255).any()
    assert caption("", 40).min() == 255


def test_a_damaged_font_of_the_machine_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(captions, "_FOLDERS", (str(tmp_path),))
    captions._font_files.cache_clear()
    captions._characters.cache_clear()
    try:
        caption("中", 100)
    finally:
        captions._font_files.cache_clear()


def test_a_text_of_millions_of_characters_is_shortened():
    assert np.array_equal(caption("x" * 3_000_000, 80), caption("x" * 100, 80))
