"""R7: a save that failed while training went on ends the run by the next step, on every rank."""

import threading

import pytest
from pretrain_runs import lines, options, write_lmdb
from sittings import command, run_limited

from lmim_fast import cli
from lmim_fast.faults import Fault, injected
from lmim_fast.train.checkpoint import folders
from lmim_fast.train.telemetry import Telemetry

SAVED, FAILS = 4, 8  # steps of the checkpoints; each passes the point "save" three times

# After each step the checkpoint in flight is waited for: it is sure at which step a failure is heard.
SCRIPT = """
import sys, threading
from lmim_fast import cli
from lmim_fast.train.telemetry import Telemetry

def waiting(self, step):
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
Telemetry.advance = waiting
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 30)


def wait_for_the_save(self, step):
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def assert_stopped(run):
    """The step after the save that failed was the last, and the checkpoint before it is whole."""
    assert [line["step"] for line in lines(run)][-1] in (FAILS, FAILS + 1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{SAVED:08d}"]
    assert folders.read(folders.latest(run)).state["step"] == SAVED


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_r07_a_save_that_failed_in_its_thread_ends_the_run_by_the_next_step(
    data, tmp_path, monkeypatch, capsys, layout
):
    monkeypatch.setattr(Telemetry, "advance", wait_for_the_save)
    run = tmp_path / "run"
    with injected(Fault("save", "full", at=4)):
        arguments = options(data, run, "--checkpoint-layout", layout, steps=30)
        assert cli.main(["pretrain", *arguments]) == 1
    assert f"error: disk full while writing {run}/checkpoints/step-{FAILS:08d}" in capsys.readouterr().err
    assert_stopped(run)


@pytest.mark.slow
def test_r07_both_ranks_end_by_the_next_step_where_the_save_of_rank_0_failed(data, tmp_path):
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    arguments = [str(script), *options(data, run, "--parallel", "shard", steps=30)]
    done = run_limited(command(arguments, 2), faults="save@4:rank0=full")
    assert done.returncode == 1
    assert done.stderr.count(f"error: disk full while writing {run}/checkpoints/step-{FAILS:08d}") == 1
    assert_stopped(run)
