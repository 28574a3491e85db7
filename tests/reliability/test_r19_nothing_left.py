"""R19: Ctrl-C, an exception or an early stop of a training run leaves no process and no shared memory."""

import os
import signal
import time

import psutil
import pytest
from pretrain_runs import lines, options, start, write_lmdb
from shared_memory import left, watched

STEPS = 100_000  # far more than are waited for


@pytest.mark.parametrize(
    "processes",
    [pytest.param(None, id="alone"), pytest.param(2, id="two ranks", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("how", ["ctrl-c", "exception", "early stop"])
def test_r19_a_run_that_ends_early_leaves_no_process_and_no_shared_memory(tmp_path, how, processes):
    broken = tuple(range(1, 28)) if how == "exception" else ()
    data, run = write_lmdb(tmp_path / "words", 30, broken=broken), tmp_path / "run"
    more = ("--checkpoint-every", "1000000", "--loader.threads", "2")
    if how == "early stop":
        more += ("--max-time", "1e-6")
    process = start(options(data, run, *more, steps=STEPS), processes=processes, start_new_session=True)
    with watched(psutil.Process(process.pid)) as shared:
        try:
            if how == "ctrl-c":
                _wait_until_training(process, run)
                os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
            out, err = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode == 0) == (how == "early stop"), (out, err)
    if how == "exception":
        assert "records seen are broken" in err
    assert [other.pid for other in psutil.process_iter() if _is_of(other, process.pid)] == []
    assert left(shared) == []


def _wait_until_training(process, run):
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or len(lines(run)) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_of(process, session):
    """Whether a process belongs to a session: also one whose parent has ended."""
    try:
        return os.getsid(process.pid) == session
    except OSError:
        return False
