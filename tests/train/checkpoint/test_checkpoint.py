import errno
import hashlib
import json
import os
import shutil
import warnings

import pytest
import safetensors.torch
import torch
from small_model import save_now

from lmim_fast.config import ModelConfig, OptimConfig, PretrainConfig
from lmim_fast.config.io import to_dict
from lmim_fast.errors import CheckpointError, LmimError
from lmim_fast.train import optim
from lmim_fast.train.checkpoint import content, folders
from lmim_fast.train.checkpoint.saver import Saver
from lmim_fast.train.export import load_model
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World

CONFIG = PretrainConfig(
    data=("x",),
    teacher="random",
    model=ModelConfig(
        width=32, depth=1, heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2, decoder_ffn=64
    ),
)


@pytest.fixture
def trained():
    """A model and an optimiser that have done one step."""
    model = make_task(CONFIG).build()
    optimizer = optim.make_optimizer(optim.decay_groups(model, 0.05), OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 128).view(2, 3, 32, 128)
    model(images, -images).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def save(tmp_path, trained):
    def save_step(step: int, keep: int = 3):
        line = content.save_teacher(tmp_path, trained[0])
        state = {"step": step, "config": to_dict(CONFIG), "teacher": line}
        return save_now(tmp_path, state, *trained, keep=keep)

    return save_step


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_weights_moments_and_step_counts_come_back_bitwise(save, trained):
    model, optimizer = trained
    read = folders.read(save(7))
    fresh = make_task(CONFIG).build()
    other = optim.make_optimizer(optim.decay_groups(fresh, 0.05), OptimConfig())
    content.restore(read, fresh, other)
    assert read.state["step"] == 7
    for (name, old), new in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert "momentum" in name or torch.equal(old, new), name
        for kind, value in optimizer.state.get(old, {}).items():
            assert torch.equal(value, other.state[new][kind]), (name, kind)
    assert len(other.state) == len(optimizer.state) > 10


def test_the_teacher_is_stored_once_for_the_run_and_not_in_the_checkpoints(save, tmp_path, trained):
    read = folders.read(save(1))
    assert not [name for name in read.model if "momentum" in name]
    teacher_bytes = (tmp_path / "teacher.safetensors").stat().st_size
    assert read.state["teacher"]["bytes"] == teacher_bytes
    with torch.no_grad():
        trained[0].model_maeenc_momentum.norm.weight.fill_(5.0)
    fresh = make_task(CONFIG).build()
    content.save_teacher(tmp_path, trained[0])
    with pytest.raises(CheckpointError, match=r"teacher\.safetensors was altered"):
        content.load_teacher(tmp_path, read.state["teacher"], fresh)


def test_load_model_gives_student_teacher_and_config_back(save, tmp_path, trained):
    with torch.no_grad():
        trained[0].model_maeenc_momentum.norm.weight.fill_(5.0)
    save(1)
    save(2)
    model, config = load_model(tmp_path)
    assert config == CONFIG
    assert not model.training
    own = trained[0].state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert load_model(tmp_path, step=1)[1] == CONFIG
    with pytest.raises(CheckpointError, match="step-00000009"):
        load_model(tmp_path, step=9)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_r05_a_damaged_file_is_named_and_the_older_checkpoint_is_used(save, tmp_path, name, damage):
    older, newer = save(1), save(2)
    path = newer / name
    if damage == "bit":
        flip_a_bit(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=name):
        folders.read(newer)
    assert folders.latest(tmp_path) == older


def test_latest_is_none_without_a_whole_checkpoint(save, tmp_path):
    assert folders.latest(tmp_path) is None
    flip_a_bit(save(1) / "model.safetensors")
    assert folders.latest(tmp_path) is None


def test_r06_unfinished_and_foreign_folders_are_no_checkpoints(save, tmp_path):
    good = save(3)
    for name in ("step-00000009.tmp", "step-00000008.damaged", "step-9", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert folders.latest(tmp_path) == good
    folders.remove_unfinished(tmp_path)
    assert "step-00000009.tmp" not in names(tmp_path)
    assert "step-00000008.damaged" in names(tmp_path)


def test_retention_keeps_the_newest_and_at_least_one(save, tmp_path):
    for step in (1, 2, 3, 4):
        save(step, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    save(5, keep=1)
    assert names(tmp_path) == ["step-00000005"]


def test_a_folder_that_cannot_be_deleted_is_warned_of_once_and_the_run_goes_on(save, tmp_path, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save(1)
    with monkeypatch.context() as patched, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        patched.setattr(shutil, "rmtree", refuse)
        for step in (2, 3, 4):
            save(step, keep=1)
        (tmp_path / "checkpoints" / "step-00000005.tmp").mkdir()
        folders.remove_unfinished(tmp_path)
    (only,) = told
    assert f"{tmp_path / 'checkpoints'} cannot be deleted (Permission denied)" in str(only.message)
    assert save(5, keep=1) == folders.latest(tmp_path)  # into the folder that was left
    assert names(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize("fails_at", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_r08_a_full_disk_is_one_clear_error_and_leaves_earlier_checkpoints_whole(
    save, tmp_path, monkeypatch, fails_at
):
    first = save(1, keep=1)
    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"step-00000002.tmp/{fails_at}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LmimError, match=r"disk full while writing .*step-00000002"):
        save(2, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert folders.latest(tmp_path) == first


def test_a_checkpoint_of_another_model_is_refused_by_tensor_name(save):
    read = folders.read(save(1))
    wider = make_task(
        PretrainConfig(**{**vars(CONFIG), "model": ModelConfig(**{**vars(CONFIG.model), "decoder_ffn": 96})})
    ).build()
    with pytest.raises(CheckpointError, match=r"decoder_blocks\.0\.linear1\.weight"):
        content.restore(read, wider)


def test_the_state_is_plain_json_with_a_checksum_of_each_file(save):
    folder = save(1)
    state = json.loads((folder / "state.json").read_text())
    assert {"model.safetensors", "optimizer.safetensors"} == set(state["files"])
    assert all(len(line["sha256"]) == 64 and line["bytes"] > 0 for line in state["files"].values())
    assert state["config"] == to_dict(CONFIG)


def test_a_checkpoint_of_an_earlier_version_is_read_and_restored(tmp_path, trained):
    model, optimizer = trained
    own, moments = content.live_tensors(model, optimizer)
    folder = tmp_path / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    lines = {}
    for name, tensors in (("model.safetensors", own), ("optimizer.safetensors", moments)):
        written = safetensors.torch.save({key: tensor.detach().clone() for key, tensor in tensors.items()})
        (folder / name).write_bytes(written)
        lines[name] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    body = {"step": 5, "config": to_dict(CONFIG), "teacher": None, "files": lines}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps({**body, "checksum": checksum}, indent=1))
    fresh = make_task(CONFIG).build()
    other = optim.make_optimizer(optim.decay_groups(fresh, 0.05), OptimConfig())
    content.restore(folders.newest(tmp_path), fresh, other)
    found, found_moments = content.live_tensors(fresh, other)
    assert all(torch.equal(tensor, own[name]) for name, tensor in found.items())
    assert all(torch.equal(tensor, moments[name]) for name, tensor in found_moments.items())
    assert found_moments.keys() == moments.keys()


def test_load_model_reads_a_sharded_checkpoint_too(tmp_path, trained):
    state = {"step": 1, "config": to_dict(CONFIG), "teacher": content.save_teacher(tmp_path, trained[0])}
    with Saver(tmp_path, World(0, 1, torch.device("cpu")), keep=1, layout="sharded") as saver:
        saver.save(state, *trained)
    model, config = load_model(tmp_path)
    assert config == CONFIG
    own = trained[0].state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
