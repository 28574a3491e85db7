"""R19: Ctrl-C, an exception or an early stop of a training run leaves no process and no shared memory."""

import os
import signal
import time

import psutil
import pytest
import warm
from pretrain_runs import lines, options, start, write_lmdb
from shared_memory import left, watched

STEPS = 100_000  # far more than are waited for


def arguments_of(folder, how):
    broken = tuple(range(1, 28)) if how == "exception" else ()
    data = write_lmdb(folder / "words", 30, broken=broken)
    more = ("--checkpoint-every", "1000000", "--loader.threads", "2")
    if how == "early stop":
        more += ("--max-time", "1e-6")
    return options(data, folder / "run", *more, steps=STEPS)


@pytest.mark.parametrize("how", ["ctrl-c", "exception", "early stop"])
def test_r19_a_run_that_ends_early_leaves_no_process_and_no_shared_memory(tmp_path, how):
    program = warm.lmim(["pretrain", *arguments_of(tmp_path, how)], session=True)
    with watched(psutil.Process(program.pid)) as shared:
        if how == "ctrl-c":
            _wait_until_training(tmp_path / "run", lambda: not program.process.is_alive())
            os.killpg(program.pid, signal.SIGINT)  # as a terminal sends it
        done = program.wait()
    assert_nothing_left(how, program.pid, shared, done.returncode, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "exception", "early stop"])
def test_r19_two_ranks_that_end_early_leave_no_process_and_no_shared_memory(tmp_path, how):
    process = start(arguments_of(tmp_path, how), processes=2, start_new_session=True)
    with watched(psutil.Process(process.pid)) as shared:
        try:
            if how == "ctrl-c":
                _wait_until_training(tmp_path / "run", process.poll)
                os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
            _, err = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert_nothing_left(how, process.pid, shared, process.returncode, err)


def assert_nothing_left(how, session, shared, code, err):
    assert (code == 0) == (how == "early stop"), err
    if how == "exception":
        assert "records seen are broken" in err
    assert [other.pid for other in psutil.process_iter() if _is_of(other, session)] == []
    assert left(shared) == []


def _wait_until_training(run, ended):
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or len(lines(run)) < 3:
        assert ended() in (None, False)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_of(process, session):
    """Whether a process belongs to a session: also one whose parent has ended."""
    try:
        return os.getsid(process.pid) == session
    except OSError:
        return False
