"""`lmim data split`: every record in one part, the same part every time."""

import os

import pytest
from import_sources import records, refused
from lmdb_folders import image, write_database

from lmim_fast import cli
from lmim_fast.config import SplitConfig
from lmim_fast.data.store.writer import LmdbWriter
from lmim_fast.errors import LmimError

COUNT = 400


def split(capsys, *arguments):
    assert cli.main(["data", "split", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return write_database(tmp_path_factory.mktemp("split") / "crops", COUNT)


@pytest.mark.parametrize("by", ["hash", "random"])
def test_every_record_is_in_one_part_in_its_order(tmp_path, capsys, crops, by):
    parts = ("--parts", "train=0.7,val=0.2,test=0.1", "--by", by)
    split(capsys, crops, *parts, "--output", tmp_path / "out")
    found = {name: records(tmp_path / "out" / name) for name in ("train", "val", "test")}
    everything = [(image(number), f"word {number}") for number in range(1, COUNT + 1)]
    assert sorted(record for part in found.values() for record in part) == sorted(everything)
    place = {record: number for number, record in enumerate(everything)}
    for part in found.values():
        assert [place[record] for record in part] == sorted(place[record] for record in part)
    sizes = [len(part) for part in found.values()]
    if by == "random":
        assert sizes == [280, 80, 40]
    else:
        assert all(abs(size - share) < 35 for size, share in zip(sizes, (280, 80, 40), strict=True))
    assert sorted(os.listdir(tmp_path / "out")) == ["test", "train", "val"]


@pytest.mark.parametrize("by", ["hash", "random"])
def test_parts_are_the_same_for_the_same_seed_only(tmp_path, capsys, crops, by):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ("--by", by, "--seed", seed, "--parts", "train=0.5,val=0.5")
        split(capsys, crops, *options, "--output", tmp_path / name)
    first, again, other = (records(tmp_path / name / "val") for name in "abc")
    assert first == again
    assert first != other


def test_equal_images_are_in_the_same_part_whatever_database_and_label_they_have(tmp_path, capsys, crops):
    labels = [(b"label-%09d" % number, b"other") for number in range(1, 201)]
    write_database(tmp_path / "again" / "crops", 200, extra=labels)
    split(capsys, crops, tmp_path / "again", "--parts", "train=0.5,val=0.5", "--output", tmp_path / "both")
    train, val = ({image for image, _ in records(tmp_path / "both" / name)} for name in ("train", "val"))
    assert len(train | val) == COUNT
    assert not train & val
    split(capsys, tmp_path / "again", "--parts", "train=0.5,val=0.5", "--output", tmp_path / "alone")
    assert {image for image, _ in records(tmp_path / "alone" / "val")} <= val


def test_it_says_how_many_records_each_part_got(tmp_path, capsys, crops):
    said = split(
        capsys, crops, "--by", "random", "--parts", "train=0.75,val=0.25", "--output", tmp_path / "out"
    )
    assert said == (
        f"300 records (75 %) in {tmp_path / 'out' / 'train'}\n"
        f"100 records (25 %) in {tmp_path / 'out' / 'val'}\n"
    )


def test_a_part_without_a_record_is_an_error_and_none_is_written(tmp_path, capsys):
    write_database(tmp_path / "crops", 3)
    error = refused(
        capsys, "split", tmp_path / "crops", "--parts", "train=0.999999,val=0.000001",
        "--output", tmp_path / "out", code=1,
    )  # fmt: skip
    assert "part val would hold none of 3 records" in error
    assert os.listdir(tmp_path) == ["crops"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("train=0.9", "add up to 1, got 0.9"),
        ("train=0.9,val=0.2", "add up to 1, got 1.1"),
        ("train=0.5,train=0.5", "train twice"),
        ("../up=0.5,val=0.5", "must look like"),
        ("train=1,val=0", "between 0 and 1, got 1"),
        ("train=nan,val=0.5", "must look like"),
        ("train=1e,val=0.5", "between 0 and 1, got 1e"),
        ("train", "must look like"),
    ],
)
def test_wrong_parts_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        SplitConfig(("x",), parts=parts)


def test_no_part_appears_when_one_cannot_be_written(tmp_path, capsys, crops, monkeypatch):
    def fails(writer):
        if writer.output.name == "train":
            raise LmimError("the disk is full")
        flush(writer)

    flush = LmdbWriter.flush
    monkeypatch.setattr(LmdbWriter, "flush", fails)
    error = refused(capsys, "split", crops, "--output", tmp_path / "out", code=1)
    assert "the disk is full" in error
    assert os.listdir(tmp_path) == []


def test_a_split_starts_anew_where_one_was_killed_but_not_over_other_files(tmp_path, capsys, crops):
    left = tmp_path / "out" / "train.partial"
    left.mkdir(parents=True)
    (left / "records.partial").write_bytes(b"half")
    split(capsys, crops, "--output", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["train", "val"]
    left.mkdir()
    assert "is not empty" in refused(capsys, "split", crops, "--output", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["train", "train.partial", "val"]


def test_no_control_character_of_a_path_reaches_the_terminal(tmp_path, capsys, crops):
    output = tmp_path / "a\x1b[31mb"
    assert "\x1b" not in split(capsys, crops, "--output", output)
    error = refused(capsys, "split", crops, "--output", output)
    assert "\x1b" not in error
    assert "a\\x1b[31mb is not empty" in error
