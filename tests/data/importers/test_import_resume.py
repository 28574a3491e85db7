"""An import that is killed goes on with the same command: every record once, the result the same."""

import json
import os
import random
import signal
import time

import pytest
import warm
from import_sources import SOURCES, content, encoded, imported, refused, rejects, write_source, write_tar

from lmim_fast import cli
from lmim_fast.data.store import resumable
from lmim_fast.faults import VARIABLE, Fault, injected

COUNT = 60


def _often_committing(arguments):
    resumable.RECORDS_PER_COMMIT = 5
    return cli.main(arguments)


@pytest.fixture(autouse=True)
def _often_committed(monkeypatch):
    monkeypatch.setattr(resumable, "RECORDS_PER_COMMIT", 5)


def start(source, output, *options, fault=""):
    """The command in a process of its own."""
    arguments = ["data", "import", str(source), "--output", str(output), *options]
    return warm.Program(_often_committing, arguments, environment={VARIABLE: fault})


def write(kind, folder):
    """A source of the format with some rejects in it."""
    source, _ = write_source(kind, folder, COUNT)
    if kind == "tsv":
        with source.open("ab") as file:
            file.write(b"gone.jpg\tx\n" * 3)
    if not kind.startswith("tar"):
        for name in ("part0/img4.png", "part3/img31.png", "part5/img52.png"):
            (folder / name).write_bytes(b"broken")
    return source


def side_files(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder) if name != "data.mdb"}


@pytest.mark.parametrize("kind", SOURCES)
def test_an_import_killed_in_the_middle_is_continued_and_every_record_is_there_once(tmp_path, capsys, kind):
    source = write(kind, tmp_path / "source")
    imported(capsys, source, "--output", tmp_path / "whole")
    process = start(source, tmp_path / "out", fault="records@6=kill")
    done = process.wait()
    assert done.returncode == -signal.SIGKILL, done.stderr
    said = imported(capsys, source, "--output", tmp_path / "out")
    assert "continuing behind 2" in said
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert side_files(tmp_path / "out") == side_files(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "source", "whole"]


@pytest.mark.parametrize("fault", ["records@1", "records@13", "publish"])
def test_an_import_killed_at_its_ends_is_continued(tmp_path, capsys, fault):
    source = write("tsv", tmp_path / "source")
    imported(capsys, source, "--output", tmp_path / "whole")
    process = start(source, tmp_path / "out", fault=f"{fault}=kill")
    assert process.wait().returncode == -signal.SIGKILL
    said = imported(capsys, source, "--output", tmp_path / "out")
    assert "57 records in" in said
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert side_files(tmp_path / "out") == side_files(tmp_path / "whole")


def test_an_import_killed_again_and_again_at_any_moment_ends_with_every_record_once(tmp_path, capsys):
    """Kills come from outside, while each commit takes half a second."""
    source = write("tar", tmp_path / "source")
    imported(capsys, source, "--output", tmp_path / "whole")
    rng, partial = random.Random(3), tmp_path / "out.partial" / "records.partial"
    for _ in range(3):
        process = start(source, tmp_path / "out", fault="records=slow")
        # 8 KiB are the two meta pages of an empty database.
        while not partial.exists() or partial.stat().st_size <= 8192:
            assert process.process.is_alive()
            time.sleep(0.01)
        time.sleep(rng.uniform(0.1, 1.1))
        process.process.kill()
        process.wait()
        assert not (tmp_path / "out").exists()
    said = imported(capsys, source, "--output", tmp_path / "out")
    assert "continuing behind" in said
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_ctrl_c_says_what_is_kept_and_the_same_command_continues(tmp_path, capsys):
    source = write("folder", tmp_path / "source")
    imported(capsys, source, "--output", tmp_path / "whole")
    process = start(source, tmp_path / "out", fault="records@3=hang")
    process.wait_for("fault: hang")
    os.kill(process.pid, signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130
    fault, error = done.stderr.split("\n", 1)
    assert fault.startswith("fault: hang")
    assert error.startswith("interrupted: 10 records are kept in ")
    assert error.endswith("and the same command continues from there\n")
    imported(capsys, source, "--output", tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_the_import_continues_when_there_is_room(tmp_path, capsys):
    source = write("csv", tmp_path / "source")
    imported(capsys, source, "--output", tmp_path / "whole")
    process = start(source, tmp_path / "out", fault="records@4=full")
    done = process.wait()
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 2  # the fault's own, and the error
    assert "No space left on device" in lines[1]
    assert "15 records are kept in" in lines[1]
    imported(capsys, source, "--output", tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def interrupt(source, output, *options):
    """An import in this process that stops at its fourth commit."""
    arguments = ["data", "import", str(source), "--output", str(output), *options]
    os.environ.pop("LMIM_FAST_FAULTS", None)
    with injected(Fault("records", "full", at=4)):
        assert cli.main(arguments) == 1


@pytest.mark.parametrize("kind", ["folder", "jsonl", "tar"])
def test_changed_sources_are_refused_and_restart_begins_anew(tmp_path, capsys, kind):
    source = write(kind, tmp_path / "source")
    interrupt(source, tmp_path / "out")
    if kind == "folder":
        (source / "part2" / "new.jpg").write_bytes(encoded(1))
    elif kind == "jsonl":
        with source.open("a") as file:
            file.write(json.dumps({"filename": "part0/img0.jpg", "text": "new"}) + "\n")
    else:
        write_tar(source, [("new.jpg", encoded(1))])
    capsys.readouterr()
    error = refused(capsys, "import", source, "--output", tmp_path / "out")
    assert "is unfinished, made with other sources than now" in error
    assert "--restart to begin anew" in error
    said = imported(capsys, source, "--output", tmp_path / "out", "--restart")
    assert "continuing" not in said
    imported(capsys, source, "--output", tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_options_are_refused_and_the_number_of_threads_is_not(tmp_path, capsys):
    source = write("folder", tmp_path / "source")
    interrupt(source, tmp_path / "out", "--workers", "1")
    capsys.readouterr()
    for option in (["--no-turn-vertical"], ["--label-from", "name"], ["--keep-broken"]):
        error = refused(capsys, "import", source, "--output", tmp_path / "out", *option)
        name = option[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        assert f"made with another {name} (" in error
        assert "--restart" in error
    said = imported(capsys, source, "--output", tmp_path / "out", "--workers", "3")
    assert "continuing behind 15 records" in said
    assert len(rejects(tmp_path / "out")) == 3


def test_files_beside_the_images_may_come_and_go_and_the_output_may_be_among_them(tmp_path, capsys):
    source = write("folder", tmp_path / "source")
    imported(capsys, source, "--output", tmp_path / "whole")
    (source / "part0" / "notes.txt").touch()
    interrupt(source, source / "lmdb")
    capsys.readouterr()
    (source / "part0" / "notes.txt").unlink()
    (source / "part1" / ".DS_Store").touch()
    said = imported(capsys, source, "--output", source / "lmdb")
    assert "continuing behind 15 records" in said
    assert content(source / "lmdb") == content(tmp_path / "whole")
    assert rejects(source / "lmdb") == rejects(tmp_path / "whole")
