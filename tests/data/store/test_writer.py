"""The writer: the database is there completely or not at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmim_fast.data.store import writer as lmdb_writer
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.store.writer import RECORDS_PER_COMMIT, LmdbWriter
from lmim_fast.errors import DataError, UsageError

FILL_THE_DISK = """
import sys
from lmim_fast.data.store.writer import LmdbWriter
from lmim_fast.errors import LmimError
try:
    with LmdbWriter(sys.argv[1], 5000) as writer:
        for number in range(5000):
            writer.put(bytes(1000), "word")
except LmimError as error:
    print(error)
"""


def write(folder, count=3):
    with LmdbWriter(folder, count) as writer:
        for number in range(count):
            writer.put(b"image %d" % number, f"wörd {number}")


def test_records_come_back_as_they_were_put(tmp_path):
    count = RECORDS_PER_COMMIT + 7
    write(tmp_path / "new" / "words", count)
    store = RecordStore([tmp_path / "new"])
    assert len(store) == count
    for index in (0, RECORDS_PER_COMMIT - 1, RECORDS_PER_COMMIT, count - 1):
        record = store.record(index)
        assert (record.image, record.label) == (b"image %d" % index, f"wörd {index}")
        assert record.key == f"image-{index + 1:09d}"
    assert os.listdir(tmp_path / "new") == ["words"]
    assert os.listdir(tmp_path / "new" / "words") == ["data.mdb"]


def test_records_without_labels_have_no_label_keys(tmp_path):
    with LmdbWriter(tmp_path / "words", 1) as writer:
        writer.put(b"image", None)
    assert RecordStore([tmp_path / "words"]).databases[0].has_labels is False


def test_an_unfinished_database_is_not_seen_by_a_reader_of_the_parent(tmp_path):
    with LmdbWriter(tmp_path / "words", 5000) as writer:
        for _ in range(2 * RECORDS_PER_COMMIT):
            writer.put(b"image", "word")
        assert (tmp_path / "words.partial" / "records.partial").stat().st_size > 2 * RECORDS_PER_COMMIT
        with pytest.raises(DataError, match="no LMDB"):
            RecordStore([tmp_path])
    assert len(RecordStore([tmp_path])) == 2 * RECORDS_PER_COMMIT


def test_an_exception_leaves_nothing(tmp_path):
    def interrupted():
        with LmdbWriter(tmp_path / "words", 5000) as writer:
            for _ in range(RECORDS_PER_COMMIT):
                writer.put(b"image", "word")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []
    write(tmp_path / "words")  # and the way is free


def test_an_lmdb_is_never_overwritten(tmp_path):
    write(tmp_path / "words")
    before = (tmp_path / "words" / "data.mdb").read_bytes()
    with pytest.raises(UsageError, match="holds an LMDB already"):
        write(tmp_path / "words", 9)
    assert (tmp_path / "words" / "data.mdb").read_bytes() == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        write(tmp_path / "words")


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "words").mkdir()
    write(tmp_path / "words")
    assert len(RecordStore([tmp_path / "words"])) == 3


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "words").write_text("a file")
    with pytest.raises(UsageError, match="words is a file"):
        write(tmp_path / "words")
    with pytest.raises(UsageError, match="Not a directory"):
        write(tmp_path / "words" / "below")


def test_two_writers_of_one_output_do_not_mix(tmp_path):
    with LmdbWriter(tmp_path / "words", 3) as writer:
        writer.put(b"first", "first")
        with pytest.raises(UsageError, match=rf"is being written by process {os.getpid()} on "):
            write(tmp_path / "words")
    assert RecordStore([tmp_path / "words"]).record(0).image == b"first"


def test_what_a_killed_writer_left_is_replaced_but_foreign_files_stay(tmp_path):
    left = tmp_path / "words.partial"
    left.mkdir()
    (left / "records.partial").write_bytes(b"half a database")
    write(tmp_path / "words")
    assert os.listdir(tmp_path) == ["words"]

    left = tmp_path / "other.partial"
    left.mkdir()
    (left / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        write(tmp_path / "other")
    assert (left / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("planted", ["words.partial", "words.partial/records.partial"])
def test_a_link_that_was_planted_where_the_records_are_written_is_refused_and_not_followed(tmp_path, planted):
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / planted).parent.mkdir(exist_ok=True)
    (tmp_path / planted).symlink_to(victim)
    with pytest.raises(
        UsageError, match=r"words\.partial is needed for the unfinished LMDB but .*; remove it"
    ):
        write(tmp_path / "words")
    assert (os.listdir(victim), (tmp_path / planted).is_symlink()) == ([], True)


def test_a_folder_without_write_permission_is_a_clear_error(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        with pytest.raises(UsageError, match="Permission denied"):
            write(locked / "words")
    finally:
        os.seteuid(user)
    assert os.listdir(locked) == []


def test_a_full_memory_map_is_doubled(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_writer, "BYTES_AT_LEAST", 2**20)
    with LmdbWriter(tmp_path / "words", 1) as writer:
        for _ in range(RECORDS_PER_COMMIT + 1):
            writer.put(bytes(5000), None)
    store = RecordStore([tmp_path / "words"])
    assert len(store) == RECORDS_PER_COMMIT + 1
    assert store.images([0, RECORDS_PER_COMMIT]) == [bytes(5000)] * 2
    store.close()


def test_a_name_that_the_finished_folder_cannot_take_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="link is a link; name the folder"):
        write(tmp_path / "link")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(UsageError, match=r"disk is a mount point; name a folder in it, .*disk/crops"):
        write(tmp_path / "disk")
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]
    write(tmp_path / "disk" / "crops")


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path):
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs `unshare -Urm` to mount a small file system")
    script = 'mount -t tmpfs -o size=1m none "$1" && "$2" -c "$3" "$1/words"; ls -A "$1"'
    result = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", tmp_path, sys.executable, FILL_THE_DISK],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()  # and `ls` finds no leftover
    assert "the disk is full" in line
    assert "words failed at record" in line
    assert "nothing was kept" in line
