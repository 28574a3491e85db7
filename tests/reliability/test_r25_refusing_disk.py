"""R5, R25 on a disk that refuses: what cannot be flushed is warned of, what cannot be read stays as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import refusing_disk
from pretrain_runs import ENVIRONMENT, write_lmdb

from lmim_fast.train.checkpoint import folders

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def done(folder):
    """Exit code and output of each command of refused_run.py."""
    library, data = refusing_disk.build(folder), write_lmdb(folder / "words", 20)
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("refused_run.py")
    subprocess.run(
        [sys.executable, str(script), str(data), str(folder)],
        env={**ENVIRONMENT, "LD_PRELOAD": str(library), "PYTHONPATH": path},
        check=True,
        timeout=300,
        cwd=folder,
    )
    return json.loads((folder / "done.json").read_text())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("whole", "(Invalid argument): names of new files may be lost"),
        ("sharded", "(Function not implemented): new files may be lost"),
        ("convert", "(Operation not supported): names of new files may be lost"),
        ("not opened", "(Permission denied): names of new files may be lost"),
        ("render", "(Invalid argument): names of new files may be lost"),
    ],
)
def test_r05_a_file_system_that_cannot_flush_is_warned_of_once_and_all_is_written(done, folder, name, words):
    assert done[name]["code"] == 0, done[name]["err"]
    lines = [line for line in done[name]["err"].splitlines() if "cannot flush" in line]
    assert len(lines) == 1, done[name]["err"]
    assert lines[0].startswith(f"warning: the file system of {folder}")
    assert words in lines[0]


def test_r05_a_disk_that_fails_is_not_taken_for_one_that_cannot_flush(done, folder):
    assert done["failing"]["code"] == 1
    assert done["failing"]["err"] == (
        f"error: cannot write {folder}/c.pth: Input/output error; mend that and run the same command again\n"
    )


@pytest.mark.parametrize(
    "name",
    ["whole EIO", "whole EMFILE", "whole convert", "sharded ESTALE", "sharded EACCES", "sharded convert"],
)
def test_r25_a_checkpoint_that_cannot_be_read_stays_and_the_run_stops_and_says_so(done, name):
    found = done[name]
    assert found["code"] == 1
    assert found["err"].startswith("error: cannot read ")
    assert "step-00000002" in found["err"]
    assert "it may be whole, so it stays as it is" in found["err"]
    assert found["err"].count("\n") == 1


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_r25_the_checkpoint_is_used_once_it_can_be_read_again(done, folder, layout):
    assert done[f"{layout} again"]["code"] == 0
    assert f"continuing {folder / layout} from step 2" in done[f"{layout} again"]["out"]
    assert sorted(os.listdir(folder / layout / "checkpoints")) == ["step-00000001", "step-00000002"]
    assert folders.read(folders.folder_of(folder / layout, 2)).state["step"] == 2
