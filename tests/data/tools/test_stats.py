"""`lmim data stats`: counts of all records, one JSON file, histograms that can be opened."""

import json
import warnings

import cv2
import numpy as np
import pytest

from lmim_fast import cli
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.store.writer import LmdbWriter
from lmim_fast.data.tools.stats import count_records
from lmim_fast.data.tools.stats_plots import histograms

HISTOGRAMS = ("heights.png", "widths.png", "aspect_ratio.png", "label_length.png", "characters.png")


def encoded(height, width, extension=".png", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(extension, pixels)[1].tobytes()


def write(folder, records):
    with LmdbWriter(folder, len(records)) as writer:
        for image, label in records:
            writer.put(image, label)
    return folder


@pytest.fixture
def words(tmp_path):
    image = encoded(10, 30)
    return write(
        tmp_path / "words",
        [
            (image, "Exit"),
            (encoded(20, 40, ".jpg"), "No.7"),
            (image, "中文 $x$"),
            (encoded(40, 30, ".jpg"), "\x1b[31m"),
            (encoded(40, 30, ".jpg")[:90], ""),
            (b"junk", "Exit"),
        ],
    )


def test_all_records_are_counted_by_what_they_are(words, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["data", "stats", str(words), "--output", str(output)]) == 0
    found = json.loads((output / "stats.json").read_text())
    assert found["records"] == found["labels"] == 6
    assert found["formats"] == {"JPEG": 3, "PNG": 2, "other": 1}
    assert found["broken_headers"] == {"truncated": 1, "not an image": 1}
    assert (found["height"]["least"], found["height"]["most"], found["height"]["mean"]) == (10, 40, 20)
    assert (found["width"]["least"], found["width"]["p50"], found["width"]["most"]) == (30, 30, 40)
    assert (found["aspect_ratio"]["least"], found["aspect_ratio"]["most"]) == (0.75, 3)
    assert (found["distinct_images"], found["duplicates"]) == (5, 1)
    assert found["label_lengths"] == {"0": 1, "4": 3, "5": 1, "6": 1}
    assert (found["characters"]["x"], found["characters"]["中"], found["characters"]["\x1b"]) == (3, 1, 1)
    assert found["character_classes"]["CJK"] == 2
    assert found["bytes"]["sum"] == sum(map(len, RecordStore([words]).images(range(6))))
    text = capsys.readouterr().out
    assert "JPEG 3 (50 %), PNG 2 (33.33 %), other 1 (16.67 %)" in text
    assert "truncated 1" in text
    assert "\x1b" not in text


def test_histograms_can_be_opened_and_no_character_makes_them_warn(words, tmp_path):
    output = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["data", "stats", str(words), "--output", str(output)]) == 0
    for name in HISTOGRAMS:
        picture = cv2.imread(str(output / name))
        assert picture.shape[0] > 300, name
        assert picture.std() > 5, name


def test_data_without_labels_or_without_one_good_record_has_fewer_histograms(tmp_path):
    bare = count_records(RecordStore([write(tmp_path / "bare", [(encoded(9, 9), None)] * 3)]))
    assert (bare.duplicates, bare.distinct_images, len(bare.label_lengths)) == (2, 1, 0)
    assert set(histograms(bare)) == {"heights.png", "widths.png", "aspect_ratio.png"}
    junk = count_records(RecordStore([write(tmp_path / "junk", [(b"junk", None), (b"", None)])]))
    assert junk.broken == {"not an image": 1, "empty": 1}
    assert junk.formats == {"other": 1}
    assert (junk.images, junk.duplicates, histograms(junk)) == (1, 0, {})
    assert junk.as_json()["height"] == {}


def test_an_output_that_exists_is_refused_before_anything_is_read(words, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stats.json").write_text("mine")
    assert cli.main(["data", "stats", str(words), "--output", str(tmp_path / "out")]) == 2
    assert "stats.json exists; remove it" in capsys.readouterr().err
    assert (tmp_path / "out" / "stats.json").read_text() == "mine"


def test_without_an_output_there_is_the_table_alone(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert cli.main(["data", "stats", str(words)]) == 0
    assert "same image bytes" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


def test_real_crops_have_the_sizes_that_inspect_finds(real_crops):
    counted = count_records(RecordStore([real_crops / "train" / "SVT_train"]))
    assert (counted.records, counted.formats, counted.broken) == (257, {"JPEG": 257}, {})
    assert len(counted.label_lengths) == len(counted.heights) == 257
