"""`lmim data merge`: all records of several LMDBs in one, byte for byte."""

import os

import pytest
from import_sources import content, records, refused
from lmdb_folders import image, write_database

from lmim_fast import cli
from lmim_fast.data.store import writer


def merged(capsys, *arguments):
    assert cli.main(["data", "merge", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def of(folder, count):
    return [(image(number, folder), f"word {number}") for number in range(1, count + 1)]


def test_all_records_follow_each_other_in_the_order_given(tmp_path, capsys):
    write_database(tmp_path / "a" / "one", 5)
    write_database(tmp_path / "a" / "two", 7)
    write_database(tmp_path / "b", 3)
    said = merged(capsys, tmp_path / "b", tmp_path / "a", "--output", tmp_path / "out")
    assert records(tmp_path / "out") == of("b", 3) + of("one", 5) + of("two", 7)
    assert said == f"15 records of 3 databases in {tmp_path / 'out'}\n"


def test_labels_stay_as_they_are_even_if_they_are_no_text(tmp_path, capsys):
    extra = [(b"label-000000001", b"\xff\xfe"), (b"label-000000002", b"")]
    write_database(tmp_path / "a", 3, extra=extra)
    merged(capsys, tmp_path / "a", "--output", tmp_path / "out")
    found = content(tmp_path / "out")
    assert found[b"label-000000001"] == b"\xff\xfe"
    assert found[b"label-000000002"] == b""


@pytest.mark.parametrize(("dedupe", "kept"), [("none", 10), ("image", 5), ("pair", 7)])
def test_exact_duplicates_are_left_out_by_image_or_by_image_and_label(tmp_path, capsys, dedupe, kept):
    write_database(tmp_path / "x" / "crops", 5)
    other = [(b"label-000000002", b"another"), (b"label-000000004", b"word 4 ")]
    write_database(tmp_path / "y" / "crops", 5, extra=other)
    said = merged(capsys, tmp_path / "x", tmp_path / "y", "--dedupe", dedupe, "--output", tmp_path / "out")
    expected = of("crops", 5)
    if dedupe == "pair":
        expected += [(image(2, "crops"), "another"), (image(4, "crops"), "word 4 ")]
    found = records(tmp_path / "out")
    assert len(found) == kept
    assert found[: len(expected)] == expected
    assert (f"{10 - kept} duplicates left out" in said) == (dedupe != "none")


def test_records_without_an_image_are_left_out_and_counted(tmp_path, capsys):
    write_database(tmp_path / "a", 4, skip=[b"image-000000002", b"label-000000002"])
    with pytest.warns(UserWarning, match="some lack image or label"):
        said = merged(capsys, tmp_path / "a", "--output", tmp_path / "out")
    assert [label for _, label in records(tmp_path / "out")] == ["word 1", "word 3", "word 4"]
    assert "1 without an image left out" in said


def test_an_output_that_exists_and_a_path_without_data_are_refused(tmp_path, capsys):
    write_database(tmp_path / "a", 2)
    write_database(tmp_path / "out", 2)
    assert "holds an LMDB already" in refused(capsys, "merge", tmp_path / "a", "--output", tmp_path / "out")
    assert "cannot be opened" in refused(capsys, "merge", tmp_path / "gone", "--output", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["a", "out"]


def test_records_may_be_as_large_as_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(writer, "BYTES_AT_LEAST", 2**18)
    monkeypatch.setattr(writer, "BYTES_PER_RECORD", 2**10)
    large = [(b"image-%09d" % number, bytes([number]) * 500_000) for number in range(1, 5)]
    write_database(tmp_path / "large", 4, extra=large)
    assert cli.main(["data", "merge", str(tmp_path / "large"), "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert [image for image, _ in records(tmp_path / "out")] == [image for _, image in large]
