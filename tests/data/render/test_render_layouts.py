"""Kinds of layout: a crop shows the letters of its label, in reading order, all of them."""

import dataclasses
from collections import Counter

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rendering import DEJAVU, PLAIN, box_font, rendered, word_file

from lmim_fast.config import RenderConfig
from lmim_fast.data.render.curves import Arc, Sag
from lmim_fast.data.render.fonts import Face
from lmim_fast.data.render.layouts import COLUMN, CURVED, MAX_ARC, SIGN, STRAIGHT, TURNED, LayoutShares
from lmim_fast.data.render.load import load_vocabulary
from lmim_fast.data.render.placement import random_placement
from lmim_fast.data.render.text import DRAWN_SIZE, Column, Line, scaled_ink

LAYOUTS = [STRAIGHT, CURVED, TURNED, COLUMN, SIGN]
FACE = Face(DEJAVU)
WIDE_WORD, COMMA, BRACKET = "\u4e2d", "\uff0c", "\u300c"


@pytest.fixture(scope="module")
def vocabulary():
    return load_vocabulary(RenderConfig())[0]


@pytest.fixture
def wide_face(tmp_path):
    """A full square, a comma at its lower left, a bracket at its upper right."""
    boxes = {"uni4E2D": (50, -70, 950, 830), "uniFF0C": (80, -60, 280, 140), "uni300C": (600, 100, 700, 800)}
    return Face(box_font(tmp_path / "wide.ttf", **boxes))


def placed(layout, label, face=FACE, seed=0):
    """A text's first ink, where it goes, its opacity in a crop with some room around, and that room."""
    rng = np.random.default_rng(seed)
    text = layout.text(rng, label, face)
    first = text.draw(DRAWN_SIZE)
    placement, size = random_placement(rng, layout, first)
    ink = scaled_ink(text, first, size, 3)
    edge = 20
    move = np.array([[1, 0, -edge], [0, 1, -edge], [0, 0, 1]])
    wider = dataclasses.replace(
        placement,
        height=placement.height + 2 * edge,
        width=placement.width + 2 * edge,
        from_crop=placement.from_crop @ move,
    )
    return first, wider, wider.resample(ink, 3, wider.box_map()), edge


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_no_letter_leaves_its_crop(vocabulary, layout):
    for seed in range(60):
        label, face = vocabulary.draw(np.random.default_rng(seed))
        _, _, alpha, edge = placed(layout, label, face, seed)
        inside = alpha[edge:-edge, edge:-edge].astype(float).sum()
        assert inside > 0
        assert alpha.astype(float).sum() - inside < 0.002 * inside, (seed, label)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_crop_read_along_its_line_shows_the_label(layout):
    for seed in range(25):
        first, placement, alpha, _ = placed(layout, "Jr7,Ly", seed=seed)
        geometry = placement.geometry
        rows, columns = first.shape
        u = (np.arange(columns) + 0.5) * (geometry.width / columns) + np.zeros((rows, 1))
        v = (np.arange(rows)[:, None] + 0.5) * (geometry.height / rows) + np.zeros((1, columns))
        x, y = geometry.curve.to_plane(u, v)
        crop = np.linalg.inv(placement.from_crop) @ np.stack((x.ravel(), y.ravel(), np.ones(x.size)))
        x, y = ((crop[:2] / crop[2]).reshape(2, rows, columns) - 0.5).astype(np.float32)
        read = cv2.remap(alpha, x, y, cv2.INTER_LINEAR).astype(float)
        same = np.corrcoef(read.ravel(), first.ravel())[0, 1]
        mirrored = max(
            np.corrcoef(read.ravel(), other.ravel())[0, 1] for other in (first[::-1], first[:, ::-1])
        )
        assert same > max(0.75, mirrored + 0.15), (seed, same, mirrored)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_more_letters_are_more_ink(layout):
    text = [layout.text(np.random.default_rng(1), "N" * count, FACE).draw(32) for count in (2, 4, 8)]
    ink = np.array([drawn.astype(float).sum() for drawn in text])
    assert ink[1:] / ink[:-1] == pytest.approx([2, 2], rel=0.1)


@pytest.mark.parametrize("layout", [COLUMN, TURNED], ids=lambda layout: layout.name)
def test_vertical_text_is_taller_than_wide(layout):
    for seed in range(20):
        _, placement, _, edge = placed(layout, "vertical", seed=seed)
        assert placement.height - 2 * edge > 1.5 * (placement.width - 2 * edge)


def test_turned_lines_run_down_and_up():
    ends = Counter()
    for seed in range(40):
        _, placement, _, _ = placed(TURNED, "station", seed=seed)
        along = placement.geometry.plane @ np.array([[0, 4], [0.5, 0.5], [1, 1]])
        ends["down" if along[1, 1] / along[2, 1] > along[1, 0] / along[2, 0] else "up"] += 1
    assert min(ends["down"], ends["up"]) > 10


def test_letters_of_a_column_stand_upright_from_top_to_bottom():
    column = Column("AB", FACE, gap=0.2).draw(60).astype(float)
    first, second = (Line(letter, FACE).draw(60).astype(float) for letter in "AB")
    for part, letter in ((column[: len(first)], first), (column[-len(second) :], second)):
        inked = np.flatnonzero(part.any(axis=0))
        part = part[:, inked[0] : inked[-1] + 1]
        assert part.shape == letter.shape
        assert np.abs(part - letter).mean() < 20


def test_an_apostrophe_stands_higher_in_a_column_than_a_comma():
    def height(mark):
        rows = np.flatnonzero(Column(f"n{mark}n", FACE, gap=0.0).draw(60).any(axis=1))
        return np.flatnonzero(np.diff(rows) > 1)  # the gap above a comma, below an apostrophe

    column = {mark: Column(f"n{mark}", FACE, gap=0.0).draw(60) for mark in ",'"}
    below = {mark: ink.shape[0] for mark, ink in column.items()}
    assert len(height("'")) == 1
    assert len(height(",")) == 1
    assert below[","] > below["'"]  # the comma hangs below the line, the apostrophe stands under the letter


def test_full_width_marks_take_their_vertical_place_and_form(wide_face):
    alone = Column(WIDE_WORD, wide_face, 0.0).draw(100)
    comma = Column(WIDE_WORD + COMMA, wide_face, 0.0).draw(100)
    mark = comma[alone.shape[0] + 2 :]
    rows, columns = np.nonzero(mark)
    assert columns.mean() > 0.7 * mark.shape[1]  # at the right, and at the top of its square
    assert rows.mean() < 30
    bracket = Column(BRACKET + WIDE_WORD, wide_face, 0.0).draw(100)[: -alone.shape[0] - 2]
    rows, columns = np.nonzero(bracket)
    assert np.ptp(columns) > 3 * np.ptp(rows)  # the upright bar lies
    assert np.ptp(np.nonzero(Line(BRACKET, wide_face).draw(100))[0]) > 60


def test_squares_of_chinese_are_equally_far_apart_and_stand_in_columns(wide_face, tmp_path):
    column = Column(WIDE_WORD * 3, wide_face, 0.0).draw(100)
    tops = np.flatnonzero(np.diff(column.any(axis=1).astype(int), prepend=0) == 1)
    assert np.diff(tops) == pytest.approx([100, 100], abs=1)
    options = dict(
        PLAIN, vertical_share=1.0, words=(word_file(tmp_path, WIDE_WORD * 4),), fonts=(wide_face.path,)
    )
    for label, image in rendered(tmp_path / "words", count=12, **options):
        height, width = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_GRAYSCALE).shape
        assert height > 2 * width, label


@given(
    st.floats(1.5, 25), st.floats(0.1, 1.0), st.booleans(), st.floats(0, 1), st.floats(0, 1), st.booleans()
)
def test_curves_are_undone_exactly(width, share, hanging, along, down, bent):
    angle = share * min(np.radians(200), width / 0.95) * (-1 if hanging else 1)
    curve = Arc(width, angle) if bent else Sag(width, share - 0.5)
    u, v = np.array([along * width]), np.array([down])
    back = curve.to_box(*curve.to_plane(u, v))
    np.testing.assert_allclose(np.concatenate(back), np.concatenate((u, v)), atol=1e-9)


@pytest.mark.parametrize(("angle", "side"), [(1.5, -1), (-1.5, 1)])
def test_an_arc_rises_or_hangs_and_keeps_the_reading_order(angle, side):
    arc = Arc(6.0, angle)
    x, y = arc.to_plane(np.linspace(0, 6, 7), np.full(7, 0.5))
    assert (np.diff(x) > 0).all()
    assert side * (y[3] - y[0]) > 1  # y goes down: the middle of an arching line is higher than its ends
    top, bottom = (arc.to_plane(np.array([3.0]), np.array([v]))[1][0] for v in (0.0, 1.0))
    assert bottom - top == pytest.approx(1.0)  # letters stand upright in the middle


def test_curved_crops_keep_to_their_size_and_bend_more_than_straight_ones():
    for seed in range(30):
        _, placement, _, edge = placed(CURVED, "boulevard", seed=seed)
        assert max(placement.height, placement.width) - 2 * edge <= MAX_ARC + 1
        assert abs(placement.geometry.curve.angle) >= np.radians(40)


def test_layouts_come_as_often_as_asked_and_suit_the_label():
    shares = LayoutShares(curved=0.2, vertical=0.3, sign=0.1)

    def names(label):
        return Counter(shares.draw(np.random.default_rng(seed), label).name for seed in range(2000))

    word = names("station")
    assert word["curved"] == pytest.approx(400, abs=60)
    assert word["column"] + word["turned"] == pytest.approx(600, abs=70)
    assert word["column"] == pytest.approx(300, abs=60)
    assert word["sign"] == pytest.approx(200, abs=45)
    assert set(names("a")) == {"straight", "sign"}
    assert set(names("abc")) == {"straight", "sign", "column", "turned"}
    assert "turned" not in names(WIDE_WORD * 20)
    assert "column" not in names("a very long line of it")
    assert "column" not in names("\u05e9\u05dc\u05d5\u05dd")  # Hebrew runs from right to left
    none = LayoutShares()
    assert {none.draw(np.random.default_rng(seed), "station").name for seed in range(50)} == {"straight"}
