import shutil

import pytest
import torch

from lmim_fast.errors import CheckpointError, LmimError
from lmim_fast.train.checkpoint import folders, removal
from lmim_fast.train.checkpoint.retention import retain


@pytest.fixture
def write(tmp_path):
    def write_step(step, score=None):
        final = folders.folder_of(tmp_path, step)
        tensors = {"a": torch.full((4,), float(step))}
        with folders.writing(final) as temporary:
            state = {"step": step, "score": score}
            return folders.commit(final, state, folders.write_whole(temporary, tensors, tensors))

    return write_step


def steps_after(run, **settings):
    retain(run, **settings)
    return folders.steps(run)[::-1]


def test_the_newest_and_every_nth_and_the_best_stay(write, tmp_path):
    for step, score in ((10, 0.9), (15, 0.2), (20, 0.8), (25, None), (30, 0.7), (35, 0.3), (40, None)):
        write(step, score)
    assert steps_after(tmp_path, keep=2, keep_every=20) == [15, 20, 35, 40]
    write(45, 0.1)
    assert steps_after(tmp_path, keep=1, keep_every=0) == [45]


def test_of_two_that_are_equally_good_the_newer_stays_and_nan_is_never_the_best(write, tmp_path):
    for step, score in ((1, 0.5), (2, 0.5), (3, float("nan")), (4, float("-inf")), (5, None)):
        write(step, score)
    assert steps_after(tmp_path, keep=1) == [2, 5]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_r06_nothing_is_deleted_unless_the_newest_reads_back_whole(write, tmp_path, name):
    for step in (1, 2, 3):
        write(step)
    path = folders.folder_of(tmp_path, 3) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        retain(tmp_path, keep=1)
    assert folders.steps(tmp_path) == [3, 2, 1]


def test_one_that_cannot_be_read_now_stays_as_it_may_be_the_best(write, tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write(step, float(step))
    read_state = folders.read_state

    def refuse(path):
        if "step-00000002" in str(path):
            raise LmimError("cannot read it")
        return read_state(path)

    monkeypatch.setattr(folders, "read_state", refuse)
    assert steps_after(tmp_path, keep=1) == [1, 2, 3]


def test_r06_one_that_is_half_deleted_has_no_finished_name(write, tmp_path, monkeypatch):
    write(1)
    write(2)

    def stop(folder):
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            retain(tmp_path, keep=1)
    assert folders.steps(tmp_path) == [2]
    removal.remove_unfinished(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_renamed_checkpoint_is_neither_counted_nor_deleted_and_real_ones_stay(write, tmp_path):
    for step in (1, 2, 3):
        write(step)
    folders.folder_of(tmp_path, 1).rename(folders.folder_of(tmp_path, 99999999))
    assert steps_after(tmp_path, keep=2) == [2, 3, 99999999]
    assert steps_after(tmp_path, keep=1) == [3, 99999999]


def test_one_that_cannot_be_read_now_takes_no_ones_place(write, tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        write(step)
    read_state = folders.read_state

    def refuse(path):
        if "step-00000003" in str(path):
            raise LmimError("cannot read it")
        return read_state(path)

    monkeypatch.setattr(folders, "read_state", refuse)
    assert steps_after(tmp_path, keep=2) == [2, 3, 4]


def test_damaged_folders_that_were_set_aside_are_not_counted(write, tmp_path):
    for step in (1, 2, 3, 4):
        write(step)
    removal.set_aside(folders.folder_of(tmp_path, 4))
    assert steps_after(tmp_path, keep=2) == [2, 3]
    assert (tmp_path / "checkpoints" / "step-00000004.damaged").is_dir()
