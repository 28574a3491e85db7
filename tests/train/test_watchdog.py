"""A process that hangs says where and ends: real processes, real threads."""

import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import warm

from lmim_fast.train.watchdog import PAUSED, Watchdog, flight_recorder_environment


def _hang(folder: Path, how: Callable[[], object]) -> None:
    def waits_for_ever():
        how()

    with Watchdog(0.5, folder, rank=3, grace=0.5) as watchdog:
        watchdog.beat("step 120")
        threading.Thread(target=time.sleep, args=(60,), name="lmim-views", daemon=True).start()
        waits_for_ever()


def _sleep():
    time.sleep(60)


def _wait_for_an_event():
    threading.Event().wait()


def _keep_the_interpreter():
    ctypes.PyDLL(None).sleep(60)  # PyDLL keeps the lock


def hang(folder: Path, how: Callable[[], object]) -> tuple[subprocess.CompletedProcess[str], float]:
    """A process that hangs so at step 120, ended; and the seconds that it lasted."""
    start = time.monotonic()
    done = warm.Program(_hang, folder, how).wait(30)
    return done, time.monotonic() - start


@pytest.mark.parametrize("how", [_sleep, _wait_for_an_event])
def test_a_hung_process_writes_the_stacks_of_all_threads_and_ends(tmp_path, how):
    done, seconds = hang(tmp_path, how)
    assert done.returncode == 1
    assert seconds < 20
    written = (tmp_path / "stacks-rank3.txt").read_text()
    for text in (done.stderr, written):
        assert "rank 3 (process " in text
        assert "since step 120" in text
        assert "in waits_for_ever" in text
        assert "is lmim-views" in text
        assert text.count("Thread 0x") >= 2


def test_a_process_whose_c_code_keeps_the_interpreter_ends_with_its_stacks_too(tmp_path):
    done, seconds = hang(tmp_path, _keep_the_interpreter)
    assert done.returncode == 1
    assert seconds < 20
    assert "Timeout" in done.stderr
    assert "in waits_for_ever" in done.stderr


def test_stacks_of_an_earlier_hang_are_kept(tmp_path):
    (tmp_path / "stacks-rank3.txt").write_text("an earlier one\n")
    hang(tmp_path, _sleep)
    assert (tmp_path / "stacks-rank3.txt").read_text().startswith("an earlier one\n\n")


@pytest.fixture
def ended():
    """Set when a watchdog would have ended the process."""
    return threading.Event()


def test_a_process_that_beats_is_left_alone_and_no_thread_or_timer_is_left(tmp_path, ended):
    with Watchdog(2, tmp_path, 0, grace=0.05, end=ended.set) as watchdog:
        for step in range(10):
            time.sleep(0.25)
            watchdog.beat(f"step {step}")
    assert not ended.is_set()
    assert list(tmp_path.iterdir()) == []
    assert "lmim-watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_paused_phase_may_take_long_and_the_next_one_may_not(tmp_path, ended, capfd):
    with Watchdog(0.3, tmp_path, 0, grace=0.05, end=ended.set) as watchdog:
        with watchdog.pause("a validation"):
            time.sleep(0.8)
        assert not ended.is_set()
        assert ended.wait(10)
    assert "since a validation" in capfd.readouterr().err


def test_a_paused_phase_that_never_ends_is_ended(tmp_path, ended, capfd):
    start = time.monotonic()
    with Watchdog(0.1, tmp_path, 0, grace=0.05, end=ended.set) as watchdog, watchdog.pause("a validation"):
        assert ended.wait(30)
    assert time.monotonic() - start > 0.1 * PAUSED
    assert "since the start" in capfd.readouterr().err


def test_an_error_that_ends_the_block_in_the_grace_is_not_cut_short(tmp_path, ended, capfd):
    def waits_for_a_peer():
        while not (tmp_path / "stacks-rank0.txt").exists():
            time.sleep(0.02)
        raise TimeoutError

    with pytest.raises(TimeoutError), Watchdog(0.2, tmp_path, 0, grace=30, end=ended.set):
        waits_for_a_peer()
    assert not ended.is_set()
    assert "rank 0" in capfd.readouterr().err


def test_a_folder_that_cannot_be_written_to_does_not_keep_the_process_alive(tmp_path, ended, capfd):
    with Watchdog(0.2, tmp_path / "gone", 0, grace=0.05, end=ended.set):
        assert ended.wait(10)
    assert "warning: cannot write" in capfd.readouterr().err


def test_a_beat_costs_less_than_two_microseconds(tmp_path):
    watchdog = Watchdog(60, tmp_path, 0)
    best = float("inf")
    for _ in range(20):  # the machine may be busy
        start = time.perf_counter()
        for _ in range(1000):
            watchdog.beat("step")
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 2e-6


def test_the_flight_recorder_writes_into_the_run_and_the_user_s_settings_stay(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("TORCH_FR", "TORCH_NCCL")):
            monkeypatch.delenv(name)
    wanted = flight_recorder_environment(tmp_path)
    assert wanted["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl-rank-"
    assert wanted["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "50")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torchrun sets it
    left = flight_recorder_environment(tmp_path)
    assert "TORCH_FR_BUFFER_SIZE" not in left
    assert left["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"


def test_the_names_of_the_flight_recorder_are_those_of_the_installed_pytorch(tmp_path):
    import torch

    headers = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d"
    known = "".join(path.read_text() for path in headers.glob("*.hpp"))
    libraries = b"".join(path.read_bytes() for path in (headers.parents[4] / "lib").glob("libtorch_cpu.so"))
    for name in flight_recorder_environment(tmp_path):
        assert name in known or name.encode() in libraries, name
