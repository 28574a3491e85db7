"""R9: a signal to the launcher or to one rank: all ranks agree, save at the next step and end cleanly."""

import os
import pty
import signal
import sys

import psutil
import pytest
import warm
from fault_runs import SETTINGS, Group, assert_same_run
from pretrain_runs import curve, options, write_lmdb

from lmim_fast.train.checkpoint import folders
from lmim_fast.train.signals import name_of, stop_signals

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 30)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that no signal reached."""
    run = tmp_path_factory.mktemp("whole") / "run"
    warm.finish(["pretrain", *options(data, run, steps=STEPS)])
    return run


def slowly(data, run):
    """Options: no checkpoint but that of the signal, which comes before the end of steps that are slow."""
    return options(data, run, "--checkpoint-every", "100", steps=STEPS)


def stopped(data, run, number, rank=None):
    """A run that one signal has ended in its midst: to a rank, or to the launcher."""
    arguments = slowly(data, run)
    with Group(arguments, run, faults="step=slow") as group:
        group.wait_for("step 2/")
        target = group.launcher.pid if rank is None else group.rank(rank).pid
        group.wait_for("step 3/")
        os.kill(target, number)
        code = group.wait(60)
        assert not group.processes()
    assert_stopped(run, number, group.text)
    return code, arguments


def assert_stopped(run, number, text):
    """It has saved after the step in which the signal came, and ended as one that was asked to."""
    (saved,) = folders.steps(run)
    assert 3 <= saved <= 5
    assert [line["step"] for line in curve(run)] == list(range(1, saved + 1))
    assert f"stopped by {number.name} after step {saved} of {STEPS}" in text
    assert "lmim_fast/" not in text, text  # a traceback would name our files; torchrun's own does not
    assert "error: " not in text.replace("ChildFailedError: ", "")
    assert not (run / "encoder.safetensors").exists()


def assert_one_signal_and_the_same_command_give_the_same_run(data, whole, run, number, rank):
    code, arguments = stopped(data, run, number, rank)
    assert (code == 0) == (rank is not None)  # torchrun tells that it was stopped itself
    warm.finish(["pretrain", *arguments])
    assert_same_run(run, whole, STEPS)


def test_r09_sigterm_to_one_rank_alone_stops_all_with_a_checkpoint_that_continues_bitwise(
    data, whole, tmp_path
):
    run = tmp_path / "run"
    group = warm.lmim_ranks(["pretrain", *slowly(data, run)], faults="step=slow")
    group.ranks[0].wait_for("step 3/")
    os.kill(group.ranks[1].pid, signal.SIGTERM)
    done = group.wait(60)
    assert [rank.returncode for rank in done] == [0, 0]
    assert_stopped(run, signal.SIGTERM, "".join(rank.stdout + rank.stderr for rank in done))
    warm.finish(["pretrain", *slowly(data, run)])
    assert_same_run(run, whole, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rank"),
    [
        *((signal.SIGTERM, None), (signal.SIGTERM, 0), (signal.SIGTERM, 1)),
        *((signal.SIGUSR1, 0), (signal.SIGUSR1, 1)),
    ],
    ids=["launcher-SIGTERM", "rank0-SIGTERM", "rank1-SIGTERM", "rank0-SIGUSR1", "rank1-SIGUSR1"],
)
def test_r09_a_signal_to_launcher_or_rank_stops_all_with_a_checkpoint_that_continues_bitwise(
    data, whole, tmp_path, number, rank
):
    assert_one_signal_and_the_same_command_give_the_same_run(data, whole, tmp_path / "run", number, rank)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1], ids=lambda number: number.name)
def test_r09_ranks_whose_launcher_is_gone_save_and_end(data, whole, tmp_path, number):
    run = tmp_path / "run"
    arguments = options(data, run, "--checkpoint-every", "100", steps=STEPS)
    with Group(arguments, run, faults="step=slow") as group:
        group.wait_for("step 3/")
        os.kill(group.launcher.pid, number)  # torchrun takes no SIGUSR1 unless it is told to: it dies of it
        assert group.wait(60) == -number
        psutil.wait_procs(group.processes(), 60)
        assert not group.processes()
    (saved,) = folders.steps(run)
    assert 3 <= saved <= 6
    assert "stopped by the end of torchrun (the process that started the ranks" in group.text
    assert f"after step {saved} of {STEPS}" in group.text
    warm.finish(["pretrain", *arguments])
    assert_same_run(run, whole, STEPS)


@pytest.mark.slow
def test_r09_a_terminal_that_closes_ends_the_run_with_a_checkpoint(data, tmp_path):
    run = tmp_path / "run"
    arguments = options(data, run, "--checkpoint-every", "100", steps=STEPS)
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(
            sys.executable,
            [sys.executable, "-m", "lmim_fast.pretrain", *arguments],
            {**SETTINGS, "LMIM_FAST_FAULTS": "step=slow"},
        )
    seen = b""
    while b"3/12" not in seen:  # a terminal shows a bar; reading fails once the process has ended
        seen += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, seen
    (saved,) = folders.steps(run)
    assert 3 <= saved <= 5


def test_r09_sighup_stops_as_sigterm_does_and_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may be under nohup themselves
    try:
        with stop_signals() as stop:
            assert stop.received == 0
            signal.raise_signal(signal.SIGHUP)
            assert name_of(stop.received) == "SIGHUP"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_r09_a_rank_notices_the_end_of_its_launcher_and_a_single_process_has_none(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with stop_signals() as stop:
        assert stop.received == 0  # as with nohup or setsid
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    with stop_signals() as stop:
        assert name_of(stop.received).startswith("the end of torchrun")
