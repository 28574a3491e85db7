"""Fonts: files and folders, collections, what is skipped by name, and which face may draw which label."""

import shutil
from collections import Counter

import numpy as np
import pytest
from fontTools.ttLib import TTCollection, TTFont
from rendering import DEJAVU, FONTS, box_font, word_file

from lmim_fast.config import RenderConfig
from lmim_fast.data.render import load
from lmim_fast.data.render.cmap import mapped_characters
from lmim_fast.data.render.coverage import Coverage, _nth_bit
from lmim_fast.data.render.fonts import Face, font_files, load_faces
from lmim_fast.data.render.labels import PRINTABLE
from lmim_fast.data.render.load import load_vocabulary
from lmim_fast.errors import UsageError

SQUARE = (50, 0, 900, 800)


def covering(paths, characters):
    return Coverage.of(load_faces(font_files(paths), characters, lambda line: None))


@pytest.fixture(scope="module")
def coverage():
    return load_vocabulary(RenderConfig())[0].coverage


def test_a_font_is_used_only_for_characters_that_it_draws_as_themselves(coverage):
    def covers(name, label):
        place = [face.path for face in coverage.faces].index(str(FONTS[name]))
        return bool(coverage.claims(label) >> place & 1) and coverage.draws(place, label)

    assert covers("DejaVuSans.ttf", PRINTABLE)
    assert covers("cmtt10.ttf", "<{|}>\\_")
    for character in '<>{|}\\_^~"':  # TeX's encoding draws other signs there
        assert not covers("cmr10.ttf", character)
    assert not covers("cmti10.ttf", "$")  # a pound sign
    used = {face.path for face in coverage.faces}
    symbols = ("cmex10", "cmmi10", "cmsy10", "LastResortHE-Regular", "STIXSizOneSymReg", "DejaVuSansDisplay")
    assert not {str(FONTS[f"{name}.ttf"]) for name in symbols} & used


def test_a_glyph_without_ink_does_not_count_as_drawn():
    coverage = covering([DEJAVU], "a\u2003\u200b ")  # an em space and a zero-width space are in its map
    assert {character for character in "a\u2003\u200b " if coverage.any_face(character) == 0} == {"a", " "}


def test_a_label_gets_each_face_that_draws_it_equally_often(tmp_path):
    both = dict(uni0061=SQUARE, uni0062=SQUARE)
    box_font(tmp_path / "1.ttf", **both)
    box_font(tmp_path / "2.ttf", uni0061=SQUARE)
    box_font(tmp_path / "3.ttf", uni0061=SQUARE, uni0062=None)  # claims b and draws nothing
    box_font(tmp_path / "4.ttf", **both)
    coverage = covering([str(tmp_path)], "ab")
    picked = Counter(coverage.pick(np.random.default_rng(seed), "ab").path[-5] for seed in range(400))
    assert picked == {"1": pytest.approx(200, abs=40), "4": pytest.approx(200, abs=40)}
    assert coverage.pick(np.random.default_rng(0), "abc") is None
    drawn = {coverage.pick_characters(np.random.default_rng(seed), 2, "ab", 3) for seed in range(20)}
    assert drawn == {"aaa"}


def test_the_nth_bit_is_found():
    bits = 0b1011_0000_0101 << 1000
    assert [_nth_bit(bits, n) for n in range(5)] == [1000, 1002, 1008, 1009, 1011]


def test_character_maps_are_those_of_fonttools():
    for path in FONTS.values():
        with TTFont(path, lazy=True) as font:
            assert mapped_characters(font).tolist() == sorted(font.getBestCmap() or {}), path.name


def test_fonts_come_from_several_files_and_folders_each_once(tmp_path):
    (tmp_path / "deep").mkdir()
    shutil.copy(DEJAVU, tmp_path / "deep" / "B.TTF")
    shutil.copy(DEJAVU, tmp_path / "a.otf")
    (tmp_path / "._a.otf").write_bytes(b"what some file managers leave")
    found = font_files([DEJAVU, str(tmp_path / "deep"), str(tmp_path)])
    assert [path.name for path in found] == ["DejaVuSans.ttf", "B.TTF", "a.otf"]


def test_a_collection_gives_all_its_faces(tmp_path):
    collection = TTCollection()
    for character in "ab":
        path = box_font(
            tmp_path / f"{character}.ttf", family=character, **{f"uni00{ord(character):02X}": SQUARE}
        )
        collection.fonts.append(TTFont(path))
    collection.save(tmp_path / "both.ttc")
    coverage = covering([str(tmp_path / "both.ttc")], "ab")
    assert coverage.faces == (Face(str(tmp_path / "both.ttc"), 0), Face(str(tmp_path / "both.ttc"), 1))
    assert (coverage.any_face("a"), coverage.any_face("b"), coverage.any_face("ab")) == (0, 1, None)
    assert coverage.faces[1].open(20).getname()[0] == "b"


def test_files_that_are_no_fonts_are_skipped_by_name_and_counted_after_five(tmp_path):
    shutil.copy(DEJAVU, tmp_path)
    for number in range(7):
        (tmp_path / f"broken{number}\x1b.ttf").write_bytes(FONTS["cmr10.ttf"].read_bytes()[: 500 * number])
    said = []
    vocabulary, _ = load_vocabulary(RenderConfig(fonts=(str(tmp_path),)), said.append)
    assert [face.path for face in vocabulary.coverage.faces] == [str(tmp_path / "DejaVuSans.ttf")]
    assert [f"broken{number}" in line and "not a font" in line for number, line in enumerate(said[:-1])] == [
        True
    ] * 5
    assert said[-1] == "left out: 2 more files that are not fonts"
    assert all(line.isprintable() for line in said)


def test_fonts_that_cannot_be_used_are_a_clear_error(tmp_path):
    folder = tmp_path / "fonts"

    def attempt():
        load_vocabulary(RenderConfig(fonts=(str(folder),)))

    with pytest.raises(UsageError, match="does not exist"):
        attempt()
    folder.mkdir()
    (folder / "readme.txt").write_text("no font")
    with pytest.raises(UsageError, match=r"holds no \.ttf"):
        attempt()
    (folder / "broken.ttf").write_bytes(FONTS["DejaVuSans.ttf"].read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"broken\.ttf' is not a font"):
        attempt()
    (folder / "faces.ttc").write_bytes(b"ttcf\0\1\0\0\xff\xff\xff\xff")
    with pytest.raises(UsageError, match=r"broken\.ttf' is not a font .*; nor are the other 1 files"):
        attempt()


def test_words_that_no_font_writes_are_left_out_and_said(tmp_path):
    said = []
    words = word_file(tmp_path, "hello\t3", "\u4e2d\u6587", "street", "\u8857\u9053")
    vocabulary, _ = load_vocabulary(RenderConfig(words=(words,)), said.append)
    assert list(vocabulary.words) == ["hello", "street"]
    assert vocabulary.words.cumulative.tolist() == [3, 4]
    assert vocabulary.alphabet == "".join(sorted(set("hellostreet")))
    (line,) = said
    assert line.startswith("left out: 2 of 4 words cannot be written with the ")
    assert "'\u4e2d\u6587', '\u8857\u9053'" in line
    assert "'\u4e2d' (U+4E2D)" in line


def test_words_that_need_two_fonts_are_left_out(tmp_path):
    said = []
    for character in "ab":
        box_font(tmp_path / f"{character}.ttf", **{f"uni00{ord(character):02X}": SQUARE})
    config = RenderConfig(words=(word_file(tmp_path, "aa", "ab"),), fonts=(str(tmp_path),))
    vocabulary, _ = load_vocabulary(config, said.append)
    assert list(vocabulary.words) == ["aa"]
    assert [face.path[-5:] for face in vocabulary.coverage.faces] == ["a.ttf"]
    assert "1 of 2 words" in said[0]
    assert "no single font has all their characters" in said[0]


def test_a_list_without_a_word_that_a_font_writes_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"2 of 2 words cannot .* that come with matplotlib: .*; give fonts"):
        load_vocabulary(RenderConfig(words=(word_file(tmp_path, "\u4e2d\u6587", "\u8857"),)))


def test_joined_scripts_are_left_out_where_pillow_cannot_shape_them(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "can_shape", lambda: False)
    said = []
    words = word_file(tmp_path, "hello", "\u05e9\u05dc\u05d5\u05dd")
    vocabulary, _ = load_vocabulary(RenderConfig(words=(words,), fonts=(DEJAVU,)), said.append)
    assert list(vocabulary.words) == ["hello"]
    assert "built without libraqm" in said[0]
