"""`lmim data inspect`: the summary says what is in the database, and the table shows it."""

import io
import zlib

import cv2
import numpy as np
import pytest
from rich.console import Console

from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.store.writer import LmdbWriter
from lmim_fast.data.tools.inspect import inspect
from lmim_fast.errors import DataError


def encoded(height, width, extension=".png"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(extension, pixels)[1].tobytes()


def png_with_spoilt_pixels():
    """Header, chunk sizes and checksums are right; the compressed pixels are not zlib data."""
    image = encoded(8, 8)
    start = image.index(b"IDAT")
    size = int.from_bytes(image[start - 4 : start], "big")
    chunk = b"IDAT" + b"\xaa" * size
    return image[:start] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + image[start + 8 + size :]


def write(folder, records):
    with LmdbWriter(folder, len(records)) as writer:
        for image, label in records:
            writer.put(image, label)
    return str(folder)


def inspected(*paths, **options):
    text = io.StringIO()
    summaries = inspect(paths, console=Console(file=text, width=100), **options)
    return summaries, text.getvalue()


@pytest.mark.filterwarnings("ignore:.*some lack image or label")
def test_a_summary_counts_what_is_there(tmp_path):
    path = write(
        tmp_path / "words",
        [
            (encoded(10, 30), "Exit"),
            (encoded(20, 40, ".jpg"), "No.7"),
            (encoded(30, 50, ".jpg"), "Ναί"),
            (encoded(40, 60, ".bmp"), "中文 ok"),
            (encoded(50, 70, ".jpg"), None),
        ],
    )
    (summary,), text = inspected(path)
    assert (summary.path, summary.records, summary.sampled, summary.labelled) == (path, 5, 5, 4)
    assert summary.formats == {"JPEG": 3, "PNG": 1, "BMP": 1}
    assert summary.heights == (10, 10, 30, 50, 50)
    assert summary.widths == (30, 30, 50, 70, 70)
    assert summary.label_lengths == {3: 1, 4: 2, 5: 1}
    assert summary.characters == {
        "a-z": 6,
        "Greek": 3,
        "A-Z": 2,
        "CJK": 2,
        "ASCII punctuation": 1,
        "digits": 1,
        "space": 1,
    }
    assert summary.distinct_characters == 15
    assert (summary.broken, summary.broken_examples) == (0, ())
    assert "5 (all read)" in text
    assert "JPEG 3 (60 %), PNG 1 (20 %), BMP 1 (20 %)" in text
    assert "least 10   5 % 10   50 % 30   95 % 50   most 50" in text


def test_broken_records_are_counted_and_the_first_are_named(tmp_path):
    good = encoded(12, 34, ".jpg")
    broken = [b"", b"no image", good[: len(good) // 2], png_with_spoilt_pixels(), encoded(300, 300), b"", b""]
    path = write(tmp_path / "words", [(image, "word") for image in [good, *broken]])
    (summary,), text = inspected(path, max_pixels=299 * 300)
    assert summary.broken == 7
    assert [(example.key, example.reason) for example in summary.broken_examples] == [
        ("image-000000002", "empty"),
        ("image-000000003", "not an image"),
        ("image-000000004", "truncated"),
        ("image-000000005", "does not decode"),
        ("image-000000006", "too large"),
    ]
    assert summary.heights == (12,) * 5  # of the good one
    assert "7 (87.5 %)" in text
    assert "image-000000004: truncated" in text
    assert "and 2 more" in text


def test_a_database_without_one_good_record_is_described_too(tmp_path):
    (summary,), text = inspected(write(tmp_path / "words", [(b"junk", None), (b"", None)]))
    assert (summary.broken, summary.labelled, summary.heights) == (2, 0, ())
    assert "none decoded" in text
    assert "label length" not in text


def test_a_large_database_is_sampled_evenly_and_says_so(tmp_path):
    path = write(tmp_path / "words", [(encoded(height, 4), "x" * height) for height in range(1, 1001)])
    (summary,), text = inspected(path, sample=100)
    assert summary.records == 1000
    assert summary.sampled == 100
    assert list(summary.label_lengths) == list(range(1, 1001, 10))
    assert "1,000 (100 read, evenly spread; the rest is about these)" in text


def test_every_database_under_a_path_gets_its_own_table(tmp_path):
    write(tmp_path / "all" / "a", [(encoded(5, 5), "aa")])
    write(tmp_path / "all" / "b" / "c", [(encoded(9, 9), None), (b"", None)])
    summaries, text = inspected(str(tmp_path / "all"))
    assert [(s.records, s.labelled, s.broken) for s in summaries] == [(1, 1, 0), (2, 0, 1)]
    assert str(tmp_path / "all" / "a") in text
    assert str(tmp_path / "all" / "b" / "c") in text
    assert "image-000000002: empty" in text
    assert "2 databases, 3 records" in text


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path):
    folder = tmp_path / "[bold]crops[/bold]"
    _, text = inspected(write(folder, [(encoded(5, 5), "[red]")]))
    assert str(folder) in text


def test_a_path_without_a_database_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no LMDB"):
        inspected(str(tmp_path))
    with pytest.raises(DataError, match="cannot be opened"):
        inspected(str(tmp_path / "missing"))


def test_inspect_lets_go_of_the_databases(tmp_path):
    path = write(tmp_path / "words", [(encoded(5, 5), "word")])
    inspected(path)
    assert RecordStore([path]).label(0) == "word"
    inspected(path)


def test_real_crops_all_decode(real_crops):
    (summary,), _ = inspected(str(real_crops / "train" / "SVT_train"))
    assert (summary.records, summary.labelled, summary.broken) == (257, 257, 0)
    assert summary.formats == {"JPEG": 257}
