"""What a folder of LMDBs may look like, and the errors of those that cannot be used."""

import os
import re
import tempfile
import warnings
from pathlib import Path

import pytest
from lmdb_folders import image, ordinary_user, write_database

from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError


def test_a_missing_image_or_label_in_the_middle_warns_at_open_and_reads_as_absent(tmp_path):
    folder = write_database(tmp_path / "crops", 10, skip=[b"image-000000004", b"label-000000007"])
    with pytest.warns(UserWarning, match=r"crops: 10 records need 21 keys, there are 19"):
        store = RecordStore([folder])
    assert store.images([2, 3, 4]) == [image(3), b"", image(5)]
    assert store.record(3).image == b""
    assert [store.label(5), store.label(6)] == ["word 6", None]


def test_labels_are_read_though_neither_the_first_nor_the_last_record_has_one(tmp_path):
    absent = [b"label-%09d" % number for number in (1, 2, 5)]
    write_database(tmp_path / "crops", 5, skip=absent)
    with pytest.warns(UserWarning, match="5 records need 11 keys, there are 8"):
        store = RecordStore([tmp_path / "crops"])
    assert store.labels(range(5)) == [None, None, "word 3", "word 4", None]


def test_unknown_keys_around_the_records_are_ignored_without_a_warning(tmp_path):
    keys = [
        b"aaa",
        b"image",
        b"image-",
        b"image-11",
        b"image-zzzzzzzzz",
        b"imago",
        b"label-x",
        b"\xff",
        b"meta",
    ]
    folder = write_database(tmp_path / "crops", 9, extra=[(key, b"1") for key in keys])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(RecordStore([folder])) == 9


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (90, dict(claimed=100), r"num-samples says 100, but the last image is image-000000090"),
        (12, dict(claimed=10), r"num-samples says 10, but the last image is image-000000012"),
        (5, dict(claimed=0), r"num-samples says 0, but the last image is image-000000005"),
        (5, dict(claimed="many"), r"num-samples is b'many', not a number"),
        (5, dict(claimed=-5), r"num-samples is b'-5', not a number"),
        (
            5,
            dict(skip=[b"num-samples"]),
            r"no key 'num-samples', its images are image-000000001 \.\. image-000000005",
        ),
        (5, dict(skip=[b"image-000000005"]), r"num-samples says 5, but the last image is image-000000004"),
        (0, dict(claimed=7), r"num-samples says 7, but there is no image"),
        (0, dict(), r"num-samples says 0, but there is no image"),
        (0, dict(skip=[b"num-samples"]), r"the database is empty"),
    ],
)
def test_r13_a_wrong_number_of_samples_is_a_data_error_with_both_counts(tmp_path, count, options, message):
    folder = write_database(tmp_path / "crops", count, **options)
    with pytest.raises(DataError, match=f"^{re.escape(str(folder))}: {message}"):
        RecordStore([folder])


def test_r13_paths_without_a_database_are_data_errors(tmp_path):
    (tmp_path / "empty/sub").mkdir(parents=True)
    (tmp_path / "file").write_text("text")
    for paths, message in (
        ([tmp_path / "nothing"], r"nothing: cannot be opened \(No such file or directory\)"),
        ([tmp_path / "file"], "file: not a folder"),
        ([tmp_path / "empty"], "empty: no LMDB here"),
        ([], "no data path was given"),
    ):
        with pytest.raises(DataError, match=message):
            RecordStore(paths)


def test_a_database_reached_twice_is_a_data_error_that_names_it(tmp_path):
    folder = write_database(tmp_path / "all/crops", 2)
    (tmp_path / "link").symlink_to(folder)
    for second in (folder, tmp_path / "all", tmp_path / "all/../all/crops", tmp_path / "link"):
        with pytest.raises(DataError, match=r"(crops|link): the database is given twice"):
            RecordStore([folder, second])


def test_links_are_followed_and_a_link_to_a_parent_folder_ends(tmp_path):
    write_database(tmp_path / "elsewhere/crops", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    assert [d.path for d in RecordStore([tmp_path / "data"]).databases] == [
        str(tmp_path / "data/linked/crops")
    ]


def test_damaged_files_are_data_errors_and_never_kill_the_process(tmp_path):
    whole = (write_database(tmp_path / "whole", 300) / "data.mdb").read_bytes()
    folder = tmp_path / "crops"
    folder.mkdir()
    for content, message in (
        (b"", "the file is empty"),
        (b"not a database " * 1000, "not a usable LMDB"),
        (whole[:100], "not a usable LMDB"),
        (whole[: len(whole) // 2], f"cut short, {len(whole) // 2} bytes, its header needs"),
        (whole[:8192], "cut short, 8192 bytes"),
    ):
        (folder / "data.mdb").write_bytes(content)
        with pytest.raises(DataError, match=message):
            RecordStore([folder])
    (folder / "data.mdb").unlink()
    (folder / "data.mdb").mkdir()
    with pytest.raises(DataError, match="no LMDB here"):
        RecordStore([folder])


def test_what_may_not_be_read_is_a_data_error():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        os.chmod(name, 0o755)
        folder = write_database(Path(name) / "crops", 2)
        with ordinary_user():
            assert len(RecordStore([name])) == 2
        for closed, message in (
            (folder / "data.mdb", r"data.mdb: cannot be read \(Permission denied\)"),
            (folder, r"no LMDB here; 1 passed over: crops: not readable by this user"),
        ):
            mode = closed.stat().st_mode
            closed.chmod(0)
            with ordinary_user(), pytest.raises(DataError, match=message):
                RecordStore([name])
            closed.chmod(mode)
