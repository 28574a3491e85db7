"""Rendered crops: exact labels, readable text, one result for any number of processes, clear errors."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features
from rendering import DEJAVU, PLAIN, box_font, records, rendered, word_file

from lmim_fast.config import RenderConfig
from lmim_fast.data.render.database import render
from lmim_fast.data.render.fonts import Face
from lmim_fast.data.render.labels import PRINTABLE
from lmim_fast.data.render.layouts import MAX_ARC, MAX_HEIGHT, MAX_WIDTH
from lmim_fast.data.render.load import load_vocabulary
from lmim_fast.data.render.style import LUMA, MIN_CONTRAST, contrasting_colour, random_colour, surface
from lmim_fast.data.render.text import Line
from lmim_fast.errors import UsageError


@pytest.fixture(scope="module")
def vocabulary():
    return load_vocabulary(RenderConfig())[0]


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """200 crops of seed 7, rendered in this process."""
    return rendered(tmp_path_factory.mktemp("render") / "words", count=200, seed=7)


def test_the_number_of_processes_changes_no_byte(crops, tmp_path):
    output = render(RenderConfig(output=str(tmp_path / "words"), count=100, seed=7, processes=3))
    assert records(output) == crops[:100]


def test_a_longer_render_begins_with_the_shorter_one(crops, tmp_path):
    assert rendered(tmp_path / "words", count=30, seed=7) == crops[:30]


def test_another_seed_gives_other_crops(crops, tmp_path):
    other = rendered(tmp_path / "words", count=30, seed=8)
    assert not {image for _, image in other} & {image for _, image in crops}
    assert [label for label, _ in other] != [label for label, _ in crops[:30]]


def test_crops_are_jpeg_and_png_images_of_varied_sizes(crops):
    images = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) for _, data in crops]
    heights = np.array([image.shape[0] for image in images])
    assert max(min(image.shape[:2]) for image in images) <= MAX_ARC
    assert max(max(image.shape[:2]) for image in images) <= MAX_WIDTH
    assert (heights <= MAX_HEIGHT).mean() > 0.8
    assert (heights < 36).sum() > 20
    assert (heights > 66).sum() > 20
    assert {data[:2] for _, data in crops} == {b"\xff\xd8", b"\x89P"}
    assert {image.ndim for image in images} == {2, 3}  # some are gray
    assert all(image.std() > 3 for image in images)


def test_labels_have_every_length_and_all_printable_characters(vocabulary):
    labels = [vocabulary.draw(np.random.default_rng(seed))[0] for seed in range(6000)]
    assert {len(label) for label in labels} == set(range(1, 26))
    assert set().union(*labels) == {*PRINTABLE, " "}
    words = {word.lower() for word in vocabulary.words}
    plain = [label for label in labels if label.lower() in words or label[:-1].lower() in words]
    lines = [label for label in labels if " " in label]
    assert 0.64 < len(plain) / len(labels) < 0.72
    assert 0.06 < len(lines) / len(labels) < 0.10
    assert {len(label.split(" ")) for label in lines} == {2, 3, 4}
    for case in (str.islower, str.isupper, str.istitle):
        assert sum(map(case, plain)) > 0.15 * len(plain)


def test_a_label_is_never_longer_than_asked():
    short, _ = load_vocabulary(RenderConfig(max_length=4, random_share=0.5, lines_share=0.3))
    labels = [short.draw(np.random.default_rng(seed))[0] for seed in range(500)]
    assert {len(label) for label in labels} == {1, 2, 3, 4}


def test_text_stands_out_from_everything_behind_it():
    forced = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        behind = surface(rng, 32, 100, random_colour(rng))
        colour = contrasting_colour(rng, behind)
        distance = np.abs((behind @ LUMA) - float(colour @ LUMA))
        enough = (distance >= MIN_CONTRAST - 1).mean() > 0.95
        forced += not enough
        assert enough or colour.max() - colour.min() < 1  # black or white where nothing reaches the contrast
        assert np.median(distance) > 0.8 * MIN_CONTRAST
    assert forced < 15


def test_letters_set_one_by_one_are_those_of_the_line():
    together = Line("Hotel", Face(DEJAVU)).draw(40)
    apart = Line("Hotel", Face(DEJAVU), 0.3).draw(40)
    assert apart.shape[0] == together.shape[0]
    assert apart.shape[1] - together.shape[1] == pytest.approx(4 * 0.3 * 40, abs=2)
    assert apart.sum() == pytest.approx(together.sum(), rel=0.01)


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no text shaping")
def test_right_to_left_words_are_drawn_right_to_left():
    word = "שלום"
    font = ImageFont.truetype(DEJAVU, 80, layout_engine=ImageFont.Layout.BASIC)
    drawn = Line(word, Face(DEJAVU)).draw(80).astype(float)

    def difference(letters):
        canvas = Image.new("L", (600, 200))
        ImageDraw.Draw(canvas).text((50, 120), letters, fill=255, font=font, anchor="ls")
        image = np.asarray(canvas.crop(canvas.getbbox()).resize(drawn.shape[::-1]))
        return np.abs(drawn - image).mean()

    assert difference(word[::-1]) < 10  # left to right, as it looks
    assert difference(word) > 50


def test_own_fonts_and_own_words_of_another_script(tmp_path):
    fonts = tmp_path / "fonts" / "nested"
    fonts.mkdir(parents=True)
    shutil.copy(DEJAVU, fonts / "Sans.TTF")
    (fonts / "._Sans.ttf").write_bytes(b"what some file managers leave")
    words = ["Αθήνα", "Καλημέρα", "naïve", "Größe", "Москва", "New York"]
    options = dict(fonts=(str(tmp_path / "fonts"),), words=(word_file(tmp_path, *words, "", "  naïve  "),))
    labels = [label for label, _ in rendered(tmp_path / "words", count=60, **PLAIN, **options)]
    forms = {form for word in words for form in (word, word.lower(), word.upper(), word.title())}
    assert set(labels) <= forms
    assert {label.lower() for label in labels} >= {word.lower() for word in words}

    vocabulary = load_vocabulary(RenderConfig(random_share=1.0, lines_share=0.0, **options))[0]
    drawn = [vocabulary.draw(np.random.default_rng(seed)) for seed in range(300)]
    assert {face.path for _, face in drawn} == {str(fonts / "Sans.TTF")}
    strings = {label for label, _ in drawn if not label.isascii()}
    assert len(strings) > 50
    assert set().union(*strings) <= set().union(*words)


def make_empty(path):
    path.write_bytes(b"\xef\xbb\xbf \n\n")


def make_latin1(path):
    path.write_bytes("café".encode("latin-1"))


def make_long(path):
    path.write_text("x" * 26 + "\n")


def make_marks(path):
    path.write_text("word\n\u0301\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "Is a directory"),
        (make_empty, "holds no word"),
        (make_latin1, "not UTF-8 .byte 3"),
        (make_long, "at most 25 characters .the shortest has 26"),
        (make_marks, "without a visible character"),
    ],
)
def test_a_word_file_that_cannot_be_used_is_a_clear_error(tmp_path, make, message):
    path = tmp_path / "list.txt"
    make(path)
    with pytest.raises(UsageError, match=message):
        render(RenderConfig(output=str(tmp_path / "words"), words=(str(path),)))


def test_an_existing_lmdb_is_refused_before_any_work(tmp_path):
    output = render(RenderConfig(output=str(tmp_path / "words"), count=1))
    with pytest.raises(UsageError, match="holds an LMDB already"):
        render(RenderConfig(output=str(output), fonts=(str(tmp_path / "missing"),)))
    assert len(records(output)) == 1


def test_chinese_labels_have_full_width_marks_and_mixed_lines(tmp_path):
    # A letter, a digit, two Chinese characters, a comma, quotes: squares, all of them.
    square, marks = (50, 0, 900, 800), "\uff0c\u300c\u300d"
    wanted = f"{PRINTABLE}\u4e2d\u6587{marks}"
    font = box_font(tmp_path / "f.ttf", **{f"uni{ord(c):04X}": square for c in wanted}, uni0020=None)
    words = word_file(tmp_path, "\u4e2d\u6587", "WiFi", "7\u6587")
    config = RenderConfig(words=(words,), fonts=(font,), random_share=0.0, lines_share=0.5)
    vocabulary, _ = load_vocabulary(config)
    labels = [vocabulary.draw(np.random.default_rng(seed))[0] for seed in range(800)]
    assert max(map(len, labels)) <= 25
    assert set().union(*labels) <= {*wanted, " "}
    assert set(marks) <= set().union(*labels)
    assert any("WiFi" in label and "\u4e2d" in label for label in labels)
    assert any("\u4e2d\u6587\u4e2d" in label for label in labels)  # Chinese is written without spaces
    assert any("\u4e2d\u6587 \u4e2d" in label for label in labels)
    assert any(label[-1] == "\uff0c" for label in labels)


def test_a_line_of_words_is_in_one_case(vocabulary):
    drawn = (vocabulary.draw(np.random.default_rng(seed))[0] for seed in range(3000))
    lines = [line for line in drawn if " " in line]
    assert all(
        line in (line.lower(), line.upper(), line.title()) or "'" in line for line in lines if line.isalpha()
    )
    assert len([line for line in lines if line.isupper()]) > 0.15 * len(lines)
    assert any(any(map(str.isdigit, line)) for line in lines)
