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
from lmim_fast.train.checkpoint import content, folders, removal
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
    removal.remove_unfinished(tmp_path)
    assert "step-00000009.tmp" not in names(tmp_path)
    assert "step-00000008.damaged" in names(tmp_path)


def test_a_renamed_checkpoint_is_an_error_that_says_both_steps_and_what_to_do(save, tmp_path):
    save(3)
    renamed = save(4).rename(folders.folder_of(tmp_path, 99999999))
    message = (
        f"{renamed} holds the checkpoint of step 4, not of the step in its name: "
        f"rename it to step-00000004, or move it out of {tmp_path / 'checkpoints'}"
    )
    damaged = []
    for read in (
        lambda: folders.read(renamed),
        lambda: folders.open_trusted(renamed),
        lambda: folders.latest(tmp_path),
        lambda: folders.newest(tmp_path, lambda *found: damaged.append(found), in_memory=False),
    ):
        with pytest.raises(folders.MisnamedError) as caught:
            read()
        assert str(caught.value) == message
    assert damaged == []
    assert names(tmp_path) == ["step-00000003", "step-99999999"]


def test_checkpoints_under_names_that_are_not_looked_for_are_told(save, tmp_path):
    save(3)
    checkpoints = tmp_path / "checkpoints"
    odd = [
        "step-000000003",
        "step-00000003 (copy)",
        "step-3",
        "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0663",
    ]
    for name in (*odd, "step-00000004.tmp", "step-00000005.damaged.2"):
        shutil.copytree(checkpoints / "step-00000003", checkpoints / name)
    assert folders.steps(tmp_path) == [3]
    assert folders.misnamed(tmp_path) == odd
    assert folders.is_finished_name("step-123456789")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_r25_a_folder_of_checkpoints_that_cannot_be_listed_is_not_one_without_any(
    save, tmp_path, monkeypatch, number
):
    save(3)

    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    for read in (folders.steps, folders.newest, folders.latest, folders.misnamed):
        with pytest.raises(LmimError, match=f"cannot read {tmp_path}/checkpoints: {os.strerror(number)}"):
            read(tmp_path)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")]
)
def test_r25_too_little_memory_to_read_a_checkpoint_does_not_make_it_damaged(
    save, tmp_path, monkeypatch, error
):
    path = save(3)

    def refuse(_):
        raise error

    monkeypatch.setattr(safetensors.torch, "load", refuse)
    with pytest.raises(LmimError, match=f"not enough host memory to read {path}") as caught:
        folders.newest(tmp_path, lambda *_: pytest.fail("called damaged"))
    assert not isinstance(caught.value, CheckpointError)


def test_a_link_that_was_planted_where_a_checkpoint_is_written_leads_nothing_astray(save, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    for step in (1, 2):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / f"step-0000000{step}.tmp").symlink_to(victim)
        if step == 1:
            removal.remove_unfinished(tmp_path)
            assert names(tmp_path) == []
    path = save(2)
    assert not path.is_symlink()
    assert folders.latest(tmp_path) == path
    assert os.listdir(victim) == ["precious"]
    (tmp_path / "checkpoints" / "step-00000002.tmp").symlink_to(victim)
    removal.delete(path)
    assert (names(tmp_path), os.listdir(victim)) == ([], ["precious"])


def test_a_folder_of_checkpoints_may_be_a_link_to_another_disk(save, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    path = save(1)
    assert folders.latest(tmp_path) == path
    assert os.listdir(tmp_path / "elsewhere") == ["step-00000001"]


def test_what_was_set_aside_before_stays(save, tmp_path):
    for expected in ("damaged", "damaged.2", "damaged.3"):
        assert removal.set_aside(save(1)).name == f"step-00000001.{expected}"
    assert len(names(tmp_path)) == 3


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
        removal.remove_unfinished(tmp_path)
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
