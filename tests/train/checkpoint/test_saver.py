"""Saves in one process."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
import warm
from small_model import ALONE, assert_same, make, step, whole_tensors

from lmim_fast.errors import LmimError
from lmim_fast.faults import VARIABLE, Fault, arm_from_environment, injected
from lmim_fast.train.checkpoint import content, folders, removal, saver
from lmim_fast.train.checkpoint.saver import Saver


@pytest.fixture
def trained():
    model, optimizer = make()
    step(model, optimizer)
    return model, optimizer


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def until_failed(saver):
    end = time.monotonic() + 60
    while not saver.failed and time.monotonic() < end:
        time.sleep(0.01)


def read_tensors(path):
    read = folders.read(path)
    named = {f"model.{name}": tensor for name, tensor in read.model.items()}
    return named | {f"optimizer.{name}": tensor for name, tensor in read.optimizer.items()}


def test_an_asynchronous_save_has_the_bytes_of_safetensors(tmp_path, trained):
    state = {"step": 3, "score": 0.5, "meter": [1, 2]}
    with Saver(tmp_path / "later", ALONE, keep=3) as saves:
        saves.save(state, *trained)
        saves.wait()
        (later,) = saves.published()
        assert saves.published() == []
    assert later == folders.folder_of(tmp_path / "later", 3)
    own, moments = content.live_tensors(*trained)
    files = files_of(later)
    assert set(files) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert files["model.safetensors"] == safetensors.torch.save(own)
    assert files["optimizer.safetensors"] == safetensors.torch.save(moments)


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_what_changes_after_a_save_began_is_not_in_it(tmp_path, trained, layout):
    model, optimizer = trained
    state = {"step": 1, "meter": [1, 2]}
    with Saver(tmp_path, ALONE, keep=9, layout=layout) as saves, injected(Fault("save", "slow")):
        for number in (1, 2):  # the second is copied into the room of the first
            expected = whole_tensors(model, optimizer)
            saves.save({**state, "step": number}, model, optimizer)
            step(model, optimizer)
            state["meter"].append(3)
            saves.wait()
            assert_same(read_tensors(folders.folder_of(tmp_path, number)), expected)
    assert folders.read(folders.folder_of(tmp_path, 1)).state["meter"] == [1, 2]


def test_r08_one_save_is_in_flight_and_training_does_not_wait_for_it(tmp_path, trained):
    with Saver(tmp_path, ALONE, keep=9) as saves, injected(Fault("save", "slow")):
        saves.save({"step": 1}, *trained)
        assert folders.steps(tmp_path) == []
        assert len(threads()) == 1
        saves.save({"step": 2}, *trained)
        assert folders.steps(tmp_path) == [1]
        assert len(threads()) == 1
        saves.wait()
        assert folders.steps(tmp_path) == [2, 1]
    assert threads() == []


@pytest.mark.parametrize("layout", ["whole", "sharded"])
@pytest.mark.parametrize("fault", [Fault("save", "full", at=1), Fault("commit", "full")], ids=str)
@pytest.mark.parametrize("heard", ["check", "wait", "save"])
def test_r07_a_failed_save_is_heard_of_once_and_harms_nothing(tmp_path, trained, layout, fault, heard):
    fault.passed = 0
    before = whole_tensors(*trained)
    with Saver(tmp_path, ALONE, keep=1, layout=layout) as saves:
        saves.save({"step": 1}, *trained)
        saves.wait()
        with injected(fault):
            saves.save({"step": 2}, *trained)
            until_failed(saves)
        hear = {"check": saves.check, "wait": saves.wait, "save": lambda: saves.save({"step": 3}, *trained)}
        with pytest.raises(LmimError, match=r"disk full while writing .*step-00000002: free some space"):
            hear[heard]()
        assert not saves.failed
        saves.check()
        assert names(tmp_path) == ["step-00000001"]
        assert threads() == []
        assert_same(read_tensors(folders.latest(tmp_path)), before)
        assert_same(whole_tensors(*trained), before)
        saves.save({"step": 3}, *trained)
    assert names(tmp_path) == ["step-00000003"]


def test_a_failure_that_is_no_disk_is_raised_as_it_is(tmp_path, trained):
    with Saver(tmp_path, ALONE, keep=1) as saves:
        with injected(Fault("save", "raise")):
            saves.save({"step": 1}, *trained)
            with pytest.raises(RuntimeError, match="injected at save"):
                saves.wait()
        assert names(tmp_path) == []


def fail_while_saving(run, trained):
    with Saver(run, ALONE, keep=1) as saves:
        saves.save({"step": 1}, *trained)
        raise KeyError("mine")


def test_a_block_that_fails_keeps_its_own_failure_and_ends_after_the_save_in_flight(tmp_path, trained):
    with injected(Fault("commit", "full")), pytest.raises(KeyError, match="mine") as caught:
        fail_while_saving(tmp_path, trained)
    assert "disk full" in caught.value.__notes__[0]
    assert threads() == []
    assert names(tmp_path) == []
    with pytest.raises(KeyError, match="mine"):
        fail_while_saving(tmp_path, trained)
    assert names(tmp_path) == ["step-00000001"]


def test_r06_a_new_checkpoint_that_does_not_read_back_deletes_nothing_and_is_heard_of(
    tmp_path, trained, monkeypatch
):
    with Saver(tmp_path, ALONE, keep=1) as saves:
        saves.save({"step": 1}, *trained)
        saves.wait()
        rename = Path.rename

        def damage(path, target):
            content = bytearray((path / "model.safetensors").read_bytes())
            content[-1] ^= 1
            (path / "model.safetensors").write_bytes(content)
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", damage)
        saves.save({"step": 2}, *trained)
        with pytest.raises(LmimError, match=r"step-00000002/model\.safetensors was altered"):
            saves.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert folders.latest(tmp_path) == folders.folder_of(tmp_path, 1)


def test_moments_that_would_be_lost_are_an_error(tmp_path, trained):
    model, optimizer = trained
    model.norm.weight = torch.nn.Parameter(torch.ones(6))  # the optimiser still has the one before
    with Saver(tmp_path, ALONE, keep=1) as saves, pytest.raises(LmimError, match="1 tensors that are not"):
        saves.save({"step": 1}, model, optimizer)


def test_auto_is_whole_in_a_world_of_one_and_depends_on_memory_elsewhere(tmp_path, trained, monkeypatch):
    with Saver(tmp_path, ALONE, keep=1) as saves:
        saves.save({"step": 1}, *trained)
    assert "layout" not in folders.read(folders.folder_of(tmp_path, 1)).state
    live = {"a": torch.zeros(1000)}
    monkeypatch.setattr(saver, "_available_bytes", lambda: 0)
    assert saver._choose_layout(live) == "whole"  # a model that each process has whole
    monkeypatch.setattr(saver, "DTensor", torch.Tensor)
    for available, layout in ((8000, "whole"), (7999, "sharded")):
        monkeypatch.setattr(saver, "_available_bytes", lambda available=available: available)
        assert saver._choose_layout(live) == layout
    monkeypatch.undo()
    assert 2**20 < saver._available_bytes() <= psutil.virtual_memory().total


def _killed(folder, layout):
    arm_from_environment()
    model, optimizer = make()
    with Saver(folder, ALONE, keep=1, layout=layout) as saves:
        for number in (1, 2):
            step(model, optimizer)
            saves.save({"step": number}, model, optimizer)


@pytest.mark.parametrize(
    ("layout", "fault", "left"),
    [
        ("whole", "gather@2", ["step-00000001"]),
        ("whole", "save@5", ["step-00000001", "step-00000002.tmp"]),
        ("whole", "commit@2", ["step-00000001", "step-00000002.tmp"]),
        ("whole", "retention", ["step-00000001", "step-00000002"]),
        ("sharded", "save@5", ["step-00000001", "step-00000002.tmp"]),
        ("sharded", "retention", ["step-00000001", "step-00000002"]),
    ],
)
def test_r06_kill_9_leaves_whole_checkpoints_and_no_half_one_with_a_finished_name(
    tmp_path, layout, fault, left
):
    done = warm.Program(_killed, tmp_path, layout, environment={VARIABLE: f"{fault}=kill"}).wait()
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(tmp_path) == left
    for path in folders.finished(tmp_path):
        folders.read(path)
    removal.remove_unfinished(tmp_path)
    assert names(tmp_path) == [name for name in left if not name.endswith(".tmp")]


def resident_bytes():
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_50_saves_leave_files_threads_and_memory_flat(tmp_path, layout):
    model, optimizer = make(width=15_000)  # 2 MB with moments and averages: a copy that leaks shows
    step(model, optimizer)
    seen = []
    with Saver(tmp_path, ALONE, keep=2, layout=layout) as saves:
        for number in range(1, 51):
            saves.save({"step": number}, model, optimizer)
            saves.wait()
            seen.append((len(os.listdir("/proc/self/fd")), threading.active_count(), resident_bytes()))
    files, alive, memory = zip(*seen[9:], strict=True)
    assert max(files) == min(files)
    assert max(alive) == min(alive)
    assert memory[-1] - memory[0] < 2 * 2**20 + sum(
        t.nbytes for t in whole_tensors(model, optimizer).values()
    )
    assert len(names(tmp_path)) == 2
