"""The resumable writer: whatever ends it, the same command goes on and writes every record once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

from lmim_fast.data.store import resumable
from lmim_fast.data.store.records import RecordStore
from lmim_fast.data.store.resumable import ResumableWriter
from lmim_fast.data.store.writer import LmdbWriter
from lmim_fast.errors import DataError, LmimError, UsageError
from lmim_fast.faults import Fault, injected

COUNT = 60
EVERY = 7
WRITE = """
import sys
from lmim_fast import faults
from lmim_fast.data.store.resumable import ResumableWriter
from lmim_fast.errors import LmimError
faults.arm_from_environment()
try:
    with ResumableWriter(sys.argv[1], {"seed": 1}) as writer:
        if not writer.complete:
            for number in range(writer.state.get("next", 0), 60):
                writer.put(b"image %d " % number * 300, f"word {number}")
                if number % 7 == 6:
                    writer.commit({"next": number + 1})
except LmimError as error:
    print(error)
    sys.exit(1)
"""


def write(folder, stop=COUNT, seed=1, **options):
    """Records up to `stop`, from where an earlier writer stopped; where it began."""
    with ResumableWriter(folder, {"seed": seed}, **options) as writer:
        start = writer.state.get("next", 0)
        if not writer.complete:
            for number in range(start, COUNT):
                if number == stop:
                    raise KeyboardInterrupt
                writer.put(b"image %d " % number * 300, f"word {number}")
                if number % EVERY == EVERY - 1:
                    writer.commit({"next": number + 1})
        return start


def interrupted(folder, stop=23):
    with pytest.raises(KeyboardInterrupt):
        write(folder, stop)


def content(folder):
    """Every key and value."""
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return list(transaction.cursor())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "crops"
    write(folder)
    assert os.listdir(folder) == ["data.mdb"]
    assert len(RecordStore([folder])) == COUNT
    return content(folder)


def test_ctrl_c_keeps_what_was_committed_and_the_next_writer_goes_on(tmp_path, whole):
    interrupted(tmp_path / "crops")
    assert os.listdir(tmp_path) == ["crops.partial"]
    with pytest.raises(DataError, match="no LMDB"):
        RecordStore([tmp_path])
    assert write(tmp_path / "crops") == 21
    assert content(tmp_path / "crops") == whole
    assert os.listdir(tmp_path) == ["crops"]
    assert os.listdir(tmp_path / "crops") == ["data.mdb"]


def run(folder, fault=""):
    return subprocess.run(
        [sys.executable, "-c", WRITE, str(folder)],
        env={**os.environ, "LMIM_FAST_FAULTS": fault},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        timeout=60,
    )


@pytest.mark.parametrize("fault", ["records@1", "records@4", "records@9", "publish"])
def test_a_killed_writer_is_continued_and_every_record_is_there_once(tmp_path, whole, fault):
    assert run(tmp_path / "crops", f"{fault}=kill").returncode == -signal.SIGKILL
    assert run(tmp_path / "crops").returncode == 0
    assert content(tmp_path / "crops") == whole


def test_a_writer_killed_between_its_last_two_renames_is_continued(tmp_path, whole, monkeypatch):
    rename = os.rename

    def killed(source, target):
        if Path(target).name == "crops":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "crops")
    assert sorted(os.listdir(tmp_path / "crops.partial")) == ["data.mdb", "resume.json"]
    write(tmp_path / "crops")
    assert content(tmp_path / "crops") == whole


def test_a_full_disk_says_what_is_kept_and_the_rest_follows_later(tmp_path, whole):
    result = run(tmp_path / "crops", "records@4=full")
    assert result.returncode == 1
    assert "No space left on device" in result.stdout
    assert f"21 records are kept in {tmp_path / 'crops.partial'}" in result.stdout
    assert run(tmp_path / "crops").returncode == 0
    assert content(tmp_path / "crops") == whole


def test_an_error_before_the_first_commit_leaves_nothing(tmp_path):
    interrupted(tmp_path / "crops", stop=5)
    assert os.listdir(tmp_path) == []
    with (
        injected(Fault("records", "full")),
        pytest.raises(LmimError, match=r"failed at record 7.*nothing was kept"),
    ):
        write(tmp_path / "crops")
    assert os.listdir(tmp_path) == []


def test_another_identity_is_refused_by_name_and_restart_begins_anew(tmp_path, whole):
    interrupted(tmp_path / "crops")
    before = sorted(path.read_bytes() for path in (tmp_path / "crops.partial").iterdir())
    with pytest.raises(UsageError, match=r"another seed \(1, now 2\).*--restart"):
        write(tmp_path / "crops", seed=2)
    assert sorted(path.read_bytes() for path in (tmp_path / "crops.partial").iterdir()) == before
    assert write(tmp_path / "crops", seed=2, restart=True) == 0
    assert content(tmp_path / "crops") == whole


def test_an_unfinished_database_that_cannot_be_read_is_kept_until_restart(tmp_path, whole):
    interrupted(tmp_path / "crops")
    unfinished = tmp_path / "crops.partial" / "records.partial"
    unfinished.write_bytes(b"damaged" * 2000)
    with pytest.raises(UsageError, match="cannot be continued"):
        write(tmp_path / "crops")
    assert unfinished.read_bytes() == b"damaged" * 2000
    write(tmp_path / "crops", restart=True)
    assert content(tmp_path / "crops") == whole


def test_a_plain_writer_leaves_an_unfinished_import_alone(tmp_path):
    interrupted(tmp_path / "crops")
    with pytest.raises(UsageError, match=r"holds resume\.json"), LmdbWriter(tmp_path / "crops", 1):
        pass
    assert write(tmp_path / "crops") == 21


def test_two_resumable_writers_of_one_output_do_not_mix(tmp_path, whole):
    with ResumableWriter(tmp_path / "crops", {"seed": 1}) as writer:
        writer.put(b"image", None)
        writer.commit({"next": 1})
        with pytest.raises(UsageError, match=rf"is being written by process {os.getpid()} on "):
            write(tmp_path / "crops")
        with pytest.raises(UsageError, match=rf"is being written by process {os.getpid()} on "):
            write(tmp_path / "crops", restart=True)
    assert len(RecordStore([tmp_path / "crops"])) == 1


def test_the_map_grows_with_the_records(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(resumable, "_FIRST_MAP", 2**16)
    write(tmp_path / "crops")
    assert content(tmp_path / "crops") == whole


def test_side_files_stay_at_a_resume_and_come_with_the_database(tmp_path):
    folder = tmp_path / "crops"

    def begin(text):
        with ResumableWriter(folder, {}, side_files=["notes.tsv"]) as writer:
            with open(writer.folder / "notes.tsv", "a") as notes:
                notes.write(text)
            writer.put(b"image", None)
            writer.commit({})
            if text == "first ":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin("first ")
    begin("second")
    assert (folder / "notes.tsv").read_text() == "first second"
    assert len(RecordStore([folder])) == 2


def test_a_commit_is_due_after_enough_records_or_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "BYTES_PER_COMMIT", 1000)
    with ResumableWriter(tmp_path / "crops", {}) as writer:
        writer.put(bytes(999), None)
        assert not writer.commit_is_due()
        writer.put(bytes(1), None)
        assert writer.commit_is_due()
        writer.commit({})
        assert not writer.commit_is_due()
    assert len(RecordStore([tmp_path / "crops"])) == 2
