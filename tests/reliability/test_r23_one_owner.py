"""R23: a run folder has one owner at a time, on any file system; the second is told who it is."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import threading
import time

import pytest
import warm
from fault_runs import Group, assert_same_run, finish
from pretrain_runs import options, write_lmdb

from lmim_fast import cli
from lmim_fast.errors import LmimError, UsageError
from lmim_fast.owner import Owner, owned
from lmim_fast.process import Process

NAME = "owner-00000000000000aa.json"
ELSEWHERE = {"host": "node7", "boot": "another start"}


def _fields_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


def announce(folder, process, name=NAME, beat=1):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({**dataclasses.asdict(process), "beat": beat}))


def acquire(folder, said=None, **times):
    """An owner, after as many tries as it takes."""
    owner = Owner(folder, **times)
    while not owner.acquire((said if said is not None else []).append):
        pass
    return owner


def test_r23_the_second_is_refused_by_name_and_the_first_leaves_nothing(tmp_path):
    run = tmp_path / "runs" / "one"
    first = acquire(run)
    with pytest.raises(UsageError) as raised:
        Owner(run).acquire(print)
    told = str(raised.value)
    assert told.startswith(
        f"{run} is being written by process {os.getpid()} on {os.uname().nodename} (since 20"
    )
    assert f"stop it (kill {os.getpid()} on " in told
    assert "choose another --output" in told
    first.release()
    assert list(tmp_path.iterdir()) == []  # folders that were made and are empty go, too


@pytest.mark.parametrize(
    ("changes", "alive"),
    [({}, True), ({"started": 1}, False), ({"pid": 2**31 - 1}, False)],
    ids=["this process", "the number of another process", "no such process"],
)
def test_r23_on_the_same_machine_an_owner_is_gone_exactly_when_its_process_is(tmp_path, changes, alive):
    announce(tmp_path / "run", dataclasses.replace(Process.this(), **changes))
    if alive:
        with pytest.raises(UsageError, match="is being written by"):
            acquire(tmp_path / "run")
        assert os.listdir(tmp_path / "run") == [NAME]
    else:
        owner = acquire(tmp_path / "run")
        assert os.listdir(tmp_path / "run") == [owner.name]
        owner.release()


def test_r23_a_killed_process_is_gone_at_once_and_a_stopped_one_is_not(tmp_path):
    run = tmp_path / "run"
    with subprocess.Popen(["sleep", "60"]) as child:
        process = dataclasses.replace(Process.this(), pid=child.pid, started=int(_fields_of(child.pid)[19]))
        announce(run, process)
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        with pytest.raises(UsageError, match=f"process {child.pid} .* stopped by a signal .kill -CONT"):
            acquire(run)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet collected by its parent
        acquire(run).release()


@pytest.mark.parametrize("content", ["elsewhere", b"", b"{", b"[]" * 9, b'{"pid": "1"}', b"\xff" * 9])
def test_r23_one_that_cannot_be_looked_at_is_gone_if_it_shows_no_life_and_is_waited_for_by_name(
    tmp_path, content
):
    if content == "elsewhere":
        announce(tmp_path, dataclasses.replace(Process.this(), **ELSEWHERE))
    else:
        (tmp_path / NAME).write_bytes(content)
    said = []
    owner = acquire(tmp_path, said, silence=0.3)
    owner.release()
    waited, taken = said
    assert "waiting up to 0 seconds for a sign of life" in waited
    assert "showed no life" in taken
    assert ("on node7 (since" in waited) == (content == "elsewhere")


def test_r23_one_elsewhere_that_shows_life_refuses_by_its_name(tmp_path):
    process = dataclasses.replace(Process.this(), **ELSEWHERE, command="lmim pretrain\x1b[2J " + "a" * 500)
    announce(tmp_path, process)
    second, said = Owner(tmp_path, silence=0.5), []
    assert not second.acquire(said.append)
    announce(tmp_path, process, beat=2)
    with pytest.raises(UsageError) as raised:
        second.acquire(said.append)
    assert f"process {os.getpid()} on node7 (since" in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert len(said) == 1


def test_r23_an_owner_shows_life_and_notices_that_it_lost_its_folder(tmp_path):
    owner = acquire(tmp_path, beat=0.02)
    first = (tmp_path / owner.name).read_bytes()
    until = time.monotonic() + 30
    while (tmp_path / owner.name).read_bytes() == first:
        assert time.monotonic() < until
    owner.check()
    os.unlink(tmp_path / owner.name)
    while not owner.lost:
        assert time.monotonic() < until
    announce(tmp_path, dataclasses.replace(Process.this(), **ELSEWHERE))
    with pytest.raises(LmimError, match=r"no longer this process's: process \d+ on node7 .*has it"):
        owner.check()
    owner.release()
    assert os.listdir(tmp_path) == [NAME]


@pytest.mark.parametrize("leftover", [False, True], ids=["a free folder", "the folder of a dead one"])
def test_r23_of_many_that_come_at_once_one_gets_the_folder_at_a_time(tmp_path, leftover):
    inside, most, got, refused = itertools.count(), [], [], []
    held = [0]
    lock, gate = threading.Lock(), threading.Barrier(8)
    if leftover:
        announce(tmp_path, dataclasses.replace(Process.this(), pid=2**31 - 1))

    def come():
        gate.wait()
        try:
            owner = acquire(tmp_path)
        except UsageError as error:
            refused.append(error)
            return
        with lock:
            held[0] += 1
            most.append(held[0])
        got.append(next(inside))
        while len(refused) < 7 - len(got) + 1 and len(refused) + len(got) < 8:
            time.sleep(0.001)  # until the others were refused, so that nobody comes after it
        with lock:
            held[0] -= 1
        owner.release()

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(got) + len(refused) == 8
    assert got
    assert max(most) == 1


def test_r23_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), owned(tmp_path / "file" / "run", print):
        pass


def test_r23_processes_of_a_job_without_torchrun_are_told_to_start_it(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    owner = acquire(tmp_path)
    with pytest.raises(UsageError, match=r"srun started 2 processes \(SLURM_NTASKS\), and each takes itself"):
        Owner(tmp_path).acquire(print)
    owner.release()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 30)


def test_r23_a_second_run_in_the_folder_of_a_running_one_is_refused_and_changes_nothing(
    data, tmp_path, capsys
):
    run = tmp_path / "run"
    arguments = options(data, run, steps=40)
    first = warm.lmim(["pretrain", *arguments], faults="step=slow")
    first.wait_for("step 1/")
    before = (run / "config.json").read_bytes()
    assert cli.main(["pretrain", *arguments, "--seed", "5"]) == 2
    assert f"error: {run} is being written by process {first.pid} on " in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == before
    first.process.kill()
    first.wait()
    assert [name for name in os.listdir(run) if name.startswith("owner-")]
    acquire(run).release()  # free at once after kill -9
    assert not [name for name in os.listdir(run) if name.startswith("owner-")]


@pytest.mark.slow
def test_r23_a_restart_after_kill_9_of_rank_0_goes_on_at_once(data, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    with Group(options(data, run, steps=12), run, restarts=1, faults="step@6:rank0:life0=kill") as group:
        assert group.wait() == 0, group.text
    assert "sign of life" not in group.text
    assert_same_run(run, finish(options(data, whole, steps=12), whole), 12)


@pytest.mark.slow
def test_r23_a_run_whose_owner_file_was_taken_stops_and_writes_nothing_more(data, tmp_path):
    run = tmp_path / "run"
    arguments = options(data, run, "--checkpoint-every", "100", steps=200)
    with Group(arguments, run, faults="step=slow") as group:
        group.wait_for("step 2/")
        (name,) = [name for name in os.listdir(run) if name.startswith("owner-")]
        os.unlink(run / name)
        assert group.wait(90) != 0
    assert f"{name} was removed from it" in group.text
    assert not (run / "checkpoints").exists()
