"""Rendered crops: exact labels, readable text, one result for any number of processes, clear errors."""

import dataclasses
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from lmim_fast.config import RenderConfig
from lmim_fast.data.render.database import render
from lmim_fast.data.render.fonts import font_files, load_fonts
from lmim_fast.data.render.style import LUMA, MIN_CONTRAST, contrasting_colour, random_colour, surface
from lmim_fast.data.render.text import MAX_HEIGHT, MAX_WIDTH, Line, random_line, random_placement
from lmim_fast.data.render.words import PRINTABLE, load_vocabulary
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import UsageError

FONTS = {path.name: path for path in font_files(None)}
DEJAVU = str(FONTS["DejaVuSans.ttf"])


def records(folder):
    store = RecordStore([folder])
    return [(store.label(index), store.images([index])[0]) for index in range(len(store))]


def rendered(folder, **options):
    return records(render(RenderConfig(output=str(folder), **options)))


def word_file(folder, *words):
    path = folder / "words.txt"
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def vocabulary():
    return load_vocabulary(None, None, 25, 0.25)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """200 crops of seed 7, rendered in this process."""
    return rendered(tmp_path_factory.mktemp("render") / "words", count=200, seed=7, processes=1)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_no_byte(crops, tmp_path, processes):
    assert rendered(tmp_path / "words", count=200, seed=7, processes=processes) == crops


def test_a_longer_render_begins_with_the_shorter_one(crops, tmp_path):
    assert rendered(tmp_path / "words", count=30, seed=7, processes=1) == crops[:30]


def test_another_seed_gives_other_crops(crops, tmp_path):
    other = rendered(tmp_path / "words", count=30, seed=8, processes=1)
    assert not {image for _, image in other} & {image for _, image in crops}
    assert [label for label, _ in other] != [label for label, _ in crops[:30]]


def test_crops_are_jpeg_and_png_images_of_varied_sizes(crops):
    images = [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) for _, data in crops]
    heights = np.array([image.shape[0] for image in images])
    assert heights.max() <= MAX_HEIGHT
    assert max(image.shape[1] for image in images) <= MAX_WIDTH
    assert (heights < 36).sum() > 20
    assert (heights > 66).sum() > 20
    assert {data[:2] for _, data in crops} == {b"\xff\xd8", b"\x89P"}
    assert {image.ndim for image in images} == {2, 3}  # some are gray
    assert all(image.std() > 3 for image in images)


def test_labels_have_every_length_and_all_printable_characters(vocabulary):
    labels = [vocabulary.draw(np.random.default_rng(seed))[0] for seed in range(6000)]
    assert {len(label) for label in labels} == set(range(1, 26))
    assert set().union(*labels) == set(PRINTABLE)
    words = {word.lower() for word in vocabulary.words}
    plain = [label for label in labels if label.lower() in words or label[:-1].lower() in words]
    assert 0.72 < len(plain) / len(labels) < 0.80
    for case in (str.islower, str.isupper, str.istitle):
        assert sum(map(case, plain)) > 0.15 * len(plain)


def test_a_label_is_never_longer_than_asked():
    short = load_vocabulary(None, None, 4, 0.5)
    labels = [short.draw(np.random.default_rng(seed))[0] for seed in range(500)]
    assert {len(label) for label in labels} == {1, 2, 3, 4}


def test_a_font_is_used_only_for_characters_that_it_draws_as_themselves(vocabulary):
    covered = {Path(font.path).name: font for font in vocabulary.fonts}
    assert covered["DejaVuSans.ttf"].covers(PRINTABLE)
    assert covered["cmtt10.ttf"].covers("<{|}>\\_")
    assert not covered["cmr10.ttf"].characters & set('<>{|}\\_^~"')  # TeX's encoding draws other signs there
    assert not covered["cmti10.ttf"].covers("$")  # a pound sign
    symbols = ("cmex10", "cmmi10", "cmsy10", "LastResortHE-Regular", "STIXSizOneSymReg", "DejaVuSansDisplay")
    assert not {f"{name}.ttf" for name in symbols} & set(covered)
    for seed in range(2000):
        label, font = vocabulary.draw(np.random.default_rng(seed))
        assert font.covers(label)


def test_a_glyph_without_ink_does_not_count_as_drawn():
    (font,) = load_fonts(
        [Path(DEJAVU)], "a\u2003\u200b "
    )  # an em space and a zero-width space are in its map
    assert font.characters == {"a", " "}


def test_no_letter_leaves_its_crop(vocabulary):
    for seed in range(150):
        rng = np.random.default_rng(seed)
        label, font = vocabulary.draw(rng)
        placement, size = random_placement(rng, random_line(rng, label, font.path))
        ink = Line(label, font.path, 0.0, ()).ink(size, 3)
        edge = 20
        move = np.array([[1, 0, -edge], [0, 1, -edge], [0, 0, 1]])
        wider = dataclasses.replace(
            placement,
            height=placement.height + 2 * edge,
            width=placement.width + 2 * edge,
            from_crop=placement.from_crop @ move,
        )
        image = wider.resample(ink, 3, wider.box_map()).astype(float)
        inside = image[edge:-edge, edge:-edge].sum()
        assert inside > 0
        assert image.sum() - inside < 0.002 * inside, (seed, label)


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
    together = Line("Hotel", DEJAVU, 0.0, ()).ink(40, 2)
    apart = Line("Hotel", DEJAVU, 0.3, ()).ink(40, 2)
    assert apart.shape[0] == together.shape[0]
    assert apart.shape[1] - together.shape[1] == pytest.approx(4 * 0.3 * 40, abs=2)
    assert apart.sum() == pytest.approx(together.sum(), rel=0.01)


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no text shaping")
def test_right_to_left_words_are_drawn_right_to_left():
    word = "שלום"
    font = ImageFont.truetype(DEJAVU, 80, layout_engine=ImageFont.Layout.BASIC)
    drawn = Line(word, DEJAVU, 0.0, ()).ink(80, 0).astype(float)

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
    options = dict(fonts=str(tmp_path / "fonts"), words=word_file(tmp_path, *words, "", "  naïve  "))
    labels = [
        label for label, _ in rendered(tmp_path / "words", count=60, random_share=0.0, processes=1, **options)
    ]
    forms = {form for word in words for form in (word, word.lower(), word.upper(), word.title())}
    assert set(labels) <= forms
    assert {label.lower() for label in labels} >= {word.lower() for word in words}

    vocabulary = load_vocabulary(options["words"], options["fonts"], 25, 1.0)
    drawn = [vocabulary.draw(np.random.default_rng(seed)) for seed in range(300)]
    assert {font.path for _, font in drawn} == {str(fonts / "Sans.TTF")}
    strings = {label for label, _ in drawn if not label.isascii()}
    assert len(strings) > 50
    assert set().union(*strings) <= set().union(*words)


def test_chinese_words_with_the_default_fonts_say_which_characters_are_missing(tmp_path):
    words = word_file(tmp_path, "hello", "中文", "街道")
    with pytest.raises(
        UsageError, match=r"2 of 3 words .* that come with matplotlib: '中文', '街道' .*'中' \(U\+4E2D\)"
    ):
        render(RenderConfig(output=str(tmp_path / "words"), words=words))
    assert not (tmp_path / "words").exists()
    assert not (tmp_path / "words.partial").exists()


def test_words_that_no_single_font_covers_are_named(tmp_path):
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    shutil.copy(FONTS["cmr10.ttf"], fonts)
    with pytest.raises(UsageError, match=r"1 of 2 words .*'a<b' \(no font has '<' \(U\+003C\)\)"):
        load_vocabulary(word_file(tmp_path, "fine", "a<b"), str(fonts), 25, 0.0)


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
        render(RenderConfig(output=str(tmp_path / "words"), words=str(path)))


def test_a_font_folder_that_cannot_be_used_is_a_clear_error(tmp_path):
    def attempt():
        render(RenderConfig(output=str(tmp_path / "words"), fonts=str(tmp_path / "fonts")))

    with pytest.raises(UsageError, match="does not exist"):
        attempt()
    (tmp_path / "fonts").mkdir()
    (tmp_path / "fonts" / "readme.txt").write_text("no font")
    with pytest.raises(UsageError, match=r"holds no \.ttf"):
        attempt()
    (tmp_path / "fonts" / "broken.ttf").write_bytes(Path(DEJAVU).read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"broken\.ttf is not a font"):
        attempt()


def test_an_existing_lmdb_is_refused_before_any_work(tmp_path):
    output = render(RenderConfig(output=str(tmp_path / "words"), count=1))
    with pytest.raises(UsageError, match="holds an LMDB already"):
        render(RenderConfig(output=str(output), fonts=str(tmp_path / "missing")))
    assert len(records(output)) == 1
