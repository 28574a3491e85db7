"""The page of an evaluation, from scored readings of real files."""

import base64
import re
from collections import Counter
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest

from lmim_fast.data.store.records import RecordStore
from lmim_fast.evaluation.layouts import TestSet
from lmim_fast.evaluation.published import published_rows
from lmim_fast.evaluation.results import Result
from lmim_fast.evaluation.scoring import Readings
from lmim_fast.report.evaluation import evaluation_html

LABELS = ["Hello", "WORLD", "<b>&", "coffee", "Route66", "lost"]
READ = ["Hello", "W0RLD", "<i>&", "cofee", "route-66", ""]
PROBABILITIES = [0.9, 0.99, 0.5, 0.7, 0.8, 0.0]
BROKEN = 5


def colour(row):
    return (10 * row, 100, 200 - 10 * row)


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        for row, label in enumerate(LABELS):
            image = cv2.imencode(".png", np.full((200, 400, 3), colour(row)[::-1], np.uint8))[1].tobytes()
            transaction.put(b"image-%09d" % (row + 1), image[:20] if row == BROKEN else image)
            transaction.put(b"label-%09d" % (row + 1), label.encode())
        transaction.put(b"num-samples", str(len(LABELS)).encode())
    return RecordStore([folder])


def result(benchmark="plain", dataset=None, name="set"):
    test_set = TestSet(name, Path(name), benchmark, dataset)
    correct = [True, False, False, False, True, False]
    readings = Readings(
        np.arange(len(LABELS)),
        LABELS,
        READ,
        np.array(PROBABILITIES, np.float32),
        np.array(correct),
        {BROKEN: "truncated"},
        3,
    )
    return Result(test_set, len(LABELS), readings.score(test_set.normalize), readings)


def draw(store, *, published=(), errors=60, **options):
    entry = result(**options)
    return evaluation_html([entry], {entry.test_set.name: store}, published, {"model": "m.pth"}, errors)


def rows_of(page, heading):
    """Cells of the first table behind a heading."""
    table = page.partition(f"<h2>{heading}")[2].partition("</table>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in table.split("<tr>")[1:]]


def test_the_table_of_sets_has_every_figure(store):
    head, row = rows_of(draw(store), "Test sets")
    shown = dict(zip(head, row, strict=True))
    assert shown == {
        "set": "set", "benchmark": "plain", "split": "-", "images": "6", "accuracy": "33.3%",
        "exact": "16.7%", "1-NED": "60.6%", "broken": "1", "no label": "3",
    }  # fmt: skip


def test_lengths_are_those_of_normalised_labels(store):
    rows = rows_of(draw(store), "By length")
    assert rows[0] == ["length", "set", "all", "images"]
    assert [(row[0], row[2], row[3]) for row in rows[1:]] == [
        ("1", "0.0%", "1"), ("4", "0.0%", "1"), ("5", "50.0%", "2"), ("6", "0.0%", "1"), ("7", "100.0%", "1"),
    ]  # fmt: skip


def test_confused_characters_are_counted_and_broken_images_left_out(store):
    rows = rows_of(draw(store), "Confused")[1:]
    assert Counter(map(tuple, rows)) == Counter(
        [("b", "i", "substitution", "1"), ("f", "nothing", "deletion", "1"), ("o", "0", "substitution", "1")]
    )


def test_the_surest_errors_come_first_with_their_crops_and_marked_differences(store):
    page = draw(store).partition("<h2>Worst errors")[2]
    tiles = page.split("<figure>")[1:]
    assert len(tiles) == 3  # the broken image has no picture
    assert "W<mark>0</mark>RLD" in tiles[0]
    assert "W<mark>O</mark>RLD" in tiles[0]
    assert "p 0.99" in tiles[0]
    assert "cof<mark>f</mark>ee" in tiles[1] or "co<mark>f</mark>fee" in tiles[1]
    assert "&lt;<mark>i</mark>&gt;&amp;" in tiles[2]
    assert "<b>" not in page
    for tile, row in zip(tiles, (1, 3, 2), strict=True):
        data = re.search(r'src="data:image/png;base64,([^"]+)"', tile).group(1)
        pixels = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        assert pixels.shape == (96, 192, 3)  # shrunk
        assert tuple(pixels[40, 90][::-1]) == colour(row)


def test_the_number_of_pictures_is_the_config_s(store):
    assert draw(store, errors=1).count("<figure>") == 1
    assert "1 of 3 wrong readings" in draw(store, errors=1)
    assert draw(store, errors=0).count("<figure>") == 0


def test_broken_images_and_missing_labels_are_said(store):
    page = draw(store)
    assert "1 image cannot be decoded, counted as wrong: image-000000006 (truncated)" in page
    assert "3 records without a label, not counted" in page


def test_published_rows_are_marked_and_stand_under_ours(store):
    page = draw(
        store, published=published_rows("union14m"), benchmark="union14m", dataset="curve", name="curve"
    )
    head, ours, *rows = rows_of(page, "Published results: union14m")
    assert head[2:] == ["curve", "multi_oriented", "artistic", "contextless", "salient", "multi_words",
                        "general", "Avg", "W-Avg"]  # fmt: skip
    assert ours[:4] == ["this model", "one set; labels as found", "33.3%", "-"]
    assert all(row[1].startswith("published: ") for row in rows)
    assert rows[0][0] == "LMIM, 20 epochs"
    assert rows[0][-2] == "86.3%"
    assert "Published results" not in draw(store)


def test_the_page_needs_no_other_file(store):
    page = draw(store)
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "default-src 'none'" in page
