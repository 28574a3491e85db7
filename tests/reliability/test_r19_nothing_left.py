"""R19: Ctrl-C, an exception or an early stop of a training run leaves no process and no shared memory."""

import os
import signal
import time

import psutil
import pytest
from pretrain_runs import lines, options, start, write_lmdb

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
    shared = set(os.listdir("/dev/shm"))
    process = start(options(data, run, *more, steps=STEPS), processes=processes, start_new_session=True)
    try:
        children = _wait_until_training(process, run) if how == "ctrl-c" else []
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode == 0) == (how == "early stop"), (out, err)
    if how == "exception":
        assert "error: " in err
        assert "broken records among the first" in err
    psutil.wait_procs(children, timeout=5)
    assert [child for child in children if child.is_running()] == []
    assert [other.pid for other in psutil.process_iter() if _is_of(other, process.pid)] == []
    assert set(os.listdir("/dev/shm")) <= shared


def _wait_until_training(process, run):
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or len(lines(run)) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(process.pid).children(recursive=True)


def _is_of(process, session):
    """Whether a process belongs to a session: also one whose parent has ended."""
    try:
        return os.getsid(process.pid) == session
    except OSError:
        return False
