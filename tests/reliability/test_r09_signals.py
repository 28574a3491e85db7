"""R9: a signal to the launcher or to one rank: all ranks agree, save at the next step and end cleanly."""

import os
import signal

import pytest
from fault_runs import Group, assert_same_run, finish
from pretrain_runs import curve, options, write_lmdb

from lmim_fast.train.checkpoint import folders

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 30)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that no signal reached."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return finish(options(data, run, steps=STEPS), run)


def stopped(data, run, number, rank=None):
    """A run that one signal has ended in its midst: to a rank, or to the launcher."""
    # No checkpoint but that of the signal; the steps are slow, so that it comes before the end.
    arguments = options(data, run, "--checkpoint-every", "100", steps=STEPS)
    with Group(arguments, run, faults="step=slow") as group:
        group.wait_for("step 2/")
        target = group.launcher.pid if rank is None else group.rank(rank).pid
        group.wait_for("step 3/")
        os.kill(target, number)
        code = group.wait(60)
        assert not group.processes()
    (saved,) = folders.steps(run)
    assert 3 <= saved <= 5
    assert [line["step"] for line in curve(run)] == list(range(1, saved + 1))
    assert f"stopped by {number.name} after step {saved} of {STEPS}" in group.text
    assert "lmim_fast/" not in group.text, (
        group.text
    )  # a traceback would name our files; torchrun's own does not
    assert "error: " not in group.text.replace("ChildFailedError: ", "")
    assert not (run / "encoder.safetensors").exists()
    return code, arguments


def assert_one_signal_and_the_same_command_give_the_same_run(data, whole, run, number, rank):
    code, arguments = stopped(data, run, number, rank)
    assert (code == 0) == (rank is not None)  # torchrun tells that it was stopped itself
    assert_same_run(finish(arguments, run), whole, STEPS)


def test_r09_sigterm_to_one_rank_alone_stops_all_with_a_checkpoint_that_continues_bitwise(
    data, whole, tmp_path
):
    assert_one_signal_and_the_same_command_give_the_same_run(
        data, whole, tmp_path / "run", signal.SIGTERM, rank=1
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rank"),
    [(signal.SIGTERM, None), (signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGUSR1, 1)],
    ids=["launcher-SIGTERM", "rank0-SIGTERM", "rank0-SIGUSR1", "rank1-SIGUSR1"],
)
def test_r09_a_signal_to_launcher_or_rank_stops_all_with_a_checkpoint_that_continues_bitwise(
    data, whole, tmp_path, number, rank
):
    assert_one_signal_and_the_same_command_give_the_same_run(data, whole, tmp_path / "run", number, rank)
