"""Checkpoints of models that several real processes share, on gloo."""

import errno
import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from small_model import ALONE, assert_same, make, save_now, step, whole_tensors
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lmim_fast.errors import CheckpointError, LmimError
from lmim_fast.faults import Fault, injected
from lmim_fast.train.checkpoint import content, files, folders, resume, saver, shards
from lmim_fast.train.checkpoint.saver import Saver

LAYOUTS = ("whole", "sharded", "hybrid")


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def train(world, folder):
    """Everything that two ranks save, and what the tensors were; then failures, on either rank."""
    meshes = {"hybrid": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))}
    answers = {}
    for name in LAYOUTS:
        model, optimizer = make(mesh=meshes.get(name), shard=True)
        layout = "whole" if name == "whole" else "sharded"
        with Saver(folder / name, world, keep=2, layout=layout) as saves:
            for number in (1, 2, 3):
                step(model, optimizer)
                with torch.no_grad():
                    model(torch.zeros(1, 5, 6))  # as an evaluation: it leaves weights gathered
                saves.save({"step": number}, model, optimizer)
                expected = whole_tensors(model, optimizer)
                step(model, optimizer)
                for _ in range(50):  # training talks on while the thread does
                    world.mean_(torch.ones(100))
                    world.largest(number)
            saves.wait()
            answers[name] = [path.name for path in saves.published()]
            torch.save(expected, folder / f"{name}.pt")
    answers["failures"] = [fail(world, folder / "failing", *make(shard=True), on) for on in (0, 1)]
    answers["whole failure"] = fail_whole(world, folder / "failing whole", *make(shard=True))
    answers["auto"] = choose(world, folder / "auto", *make(shard=True))
    return answers


def fail(world, run, model, optimizer, on):
    """A full disk on one rank while both write their shards."""
    step(model, optimizer)
    with Saver(run, world, keep=1, layout="sharded") as saves:
        saves.save({"step": 1 + 10 * on}, model, optimizer)
        saves.wait()
        with injected(Fault("save", "full", rank=on)):
            saves.save({"step": 2 + 10 * on}, model, optimizer)
            messages = [heard(saves.wait)]
        saves.check()
        dist.barrier(group=world.control)
        left = names(run)
        dist.barrier(group=world.control)
        saves.save({"step": 3 + 10 * on}, model, optimizer)
    dist.barrier(group=world.control)
    return messages, left, names(run), [t.name for t in threading.enumerate() if t.name == "checkpoint"]


def fail_whole(world, run, model, optimizer):
    """Rank 0 alone writes, and fails: the other hears of it when both agree, or at the next save."""
    step(model, optimizer)
    found = []
    with Saver(run, world, keep=1, layout="whole") as saves:
        with injected(Fault("commit", "full", rank=0)):
            saves.save({"step": 1}, model, optimizer)
            end = time.monotonic() + 60
            while not any(world.largest(int(saves.failed))) and time.monotonic() < end:
                pass
            found.append(heard(saves.check))
            saves.save({"step": 2}, model, optimizer)
            found.append(heard(lambda: saves.save({"step": 3}, model, optimizer)))
        saves.save({"step": 4}, model, optimizer)
    dist.barrier(group=world.control)
    return found, names(run)


def choose(world, run, model, optimizer):
    """Rank 0 has no memory left, rank 1 has: both shard."""
    step(model, optimizer)
    saver._available_bytes = lambda: 0 if world.is_main else 2**60
    with Saver(run, world, keep=1) as saves:
        saves.save({"step": 1}, model, optimizer)
    dist.barrier(group=world.control)
    return sorted(folders.read(folders.folder_of(run, 1)).state["files"])


def heard(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def restore_all(world, folder, *runs):
    """Each checkpoint into a model sharded over this many ranks; what it then holds, if that is the same."""
    answers = {}
    for name in runs:
        path = folders.latest(folder / name)
        model, optimizer = make(seed=5, shard=True)
        content.restore(folders.open_trusted(path), model, optimizer)
        found = whole_tensors(model, optimizer)
        assert_same(found, torch.load(folder / f"{name}.pt"))
        for parameter, state in optimizer.state.items():
            assert isinstance(state["exp_avg"], DTensor)
            assert isinstance(state["average"], DTensor)
            assert state["exp_avg"].placements == parameter.placements
            assert not isinstance(state["step"], DTensor)
            local = state["exp_avg"].to_local()
            assert local.untyped_storage().nbytes() == local.nbytes  # it holds no whole tensor alive
        step(model, optimizer)  # the optimiser takes what it was given
        answers[name] = "the same"
    if world.size == 1:
        with Saver(folder / "one", world, keep=1, layout="sharded") as saves:
            torch.save(whole_tensors(model, optimizer), folder / "one.pt")
            saves.save({"step": 1}, model, optimizer)
    return answers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of the runs of two ranks, and what each rank saw."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(train, folder, size=2, grouped=True)


def test_r08_two_ranks_publish_and_keep_the_same_while_training_talks_on(trained):
    folder, ranks = trained
    steps = [f"step-{number:08d}" for number in (1, 2, 3)]
    assert [answers["whole"] for answers in ranks] == [steps, []]
    assert [answers["sharded"] for answers in ranks] == [steps, steps]
    for layout in LAYOUTS:
        assert names(folder / layout) == steps[1:]
    assert ranks[0]["auto"] == ["shards/.metadata", "shards/__0_0.distcp", "shards/__1_0.distcp"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_two_ranks_is_the_same_in_one_plain_process(trained, layout):
    folder, _ = trained
    expected = torch.load(folder / f"{layout}.pt")
    path = folders.latest(folder / layout)
    for opened in (folders.read(path), folders.open_verified(path)):
        model, optimizer = make(seed=9)
        content.restore(opened, model, optimizer)
        assert_same(whole_tensors(model, optimizer), expected)
        step(model, optimizer)
    model, _ = make(seed=9)
    content.restore(folders.open_verified(path), model)
    own = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    assert_same(own, {name: tensor for name, tensor in expected.items() if name.startswith("model.")})


def test_r02_any_checkpoint_comes_back_at_another_number_of_ranks_and_in_another_sharding(trained):
    folder, _ = trained
    assert run_ranks(restore_all, folder, *LAYOUTS, size=1, grouped=True) == [
        dict.fromkeys(LAYOUTS, "the same")
    ]
    grown = (*LAYOUTS, "one")
    assert (
        run_ranks(restore_all, folder, *grown, size=2, grouped=True) == [dict.fromkeys(grown, "the same")] * 2
    )


def test_a_plain_checkpoint_comes_back_sharded(tmp_path):
    model, optimizer = make()
    step(model, optimizer)
    save_now(tmp_path / "plain", {"step": 1}, model, optimizer)
    with Saver(tmp_path / "alone", ALONE, keep=1, layout="sharded") as saves:
        saves.save({"step": 1}, model, optimizer)
    for name in ("plain", "alone"):
        torch.save(whole_tensors(model, optimizer), tmp_path / f"{name}.pt")
    assert run_ranks(restore_all, tmp_path, "plain", "alone", size=2, grouped=True)[0] == {
        "plain": "the same",
        "alone": "the same",
    }


@pytest.mark.parametrize("on", [0, 1])
def test_r08_a_full_disk_on_one_rank_fails_the_save_of_both_and_leaves_nothing_of_it(trained, on):
    first, second, third = (f"step-{number + 10 * on:08d}" for number in (1, 2, 3))
    for rank, answers in enumerate(trained[1]):
        (message,), left, after, alive = answers["failures"][on]
        assert message.startswith("LmimError: disk full while writing ")
        assert second in message
        assert message.endswith(f"(rank {on})") == (rank != on)
        assert left == [first]
        assert after == [third]
        assert alive == []


def test_r07_a_failure_of_rank_0_alone_is_agreed_on_or_heard_at_the_next_save(trained):
    (mine, mine_left), (other, other_left) = (answers["whole failure"] for answers in trained[1])
    assert "disk full" in mine[0]
    assert other[0] == "nothing"
    assert "step-00000002: free some space" in mine[1]
    assert other[1].startswith("LmimError: disk full")
    assert mine_left == other_left == ["step-00000004"]


@pytest.fixture
def sharded(trained, tmp_path):
    """A run with two sharded checkpoints of two ranks, free to be damaged."""
    shutil.copytree(trained[0] / "sharded", tmp_path / "run")
    return tmp_path / "run"


FILES = ["shards/__0_0.distcp", "shards/__1_0.distcp", "shards/.metadata", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_r05_a_damaged_shard_is_named_and_the_older_checkpoint_is_used(sharded, name, damage):
    path = folders.folder_of(sharded, 3) / name
    whole = path.read_bytes()
    if damage == "bit":
        path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    elif damage == "cut":
        path.write_bytes(whole[:-10])
    else:
        path.unlink()
    for opened in (folders.read, folders.open_verified):
        with pytest.raises(CheckpointError, match=name):
            opened(folders.folder_of(sharded, 3))
    assert folders.latest(sharded) == folders.folder_of(sharded, 2)
    for in_memory in (True, False):
        assert folders.newest(sharded, in_memory=in_memory).state["step"] == 2


class Config:
    resume = True


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_what_cannot_be_read_at_a_resume_is_not_set_aside(sharded, monkeypatch, number):
    opened = Path.open

    def refuse(path, *arguments, **options):
        if path.name == "__1_0.distcp":
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(LmimError, match=r"cannot read .*step-00000003/shards/__1_0\.distcp") as caught:
            resume._choose(sharded, Config(), print)
    assert not isinstance(caught.value, CheckpointError)
    assert names(sharded) == ["step-00000002", "step-00000003"]
    assert resume._choose(sharded, Config(), print).state["step"] == 3


def test_a_damaged_sharded_checkpoint_is_set_aside_at_a_resume(sharded):
    (folders.folder_of(sharded, 3) / "shards" / "__1_0.distcp").unlink()
    said = []
    found = resume._choose(sharded, Config(), said.append)
    assert (found.state["step"], found.model) == (2, {})
    assert names(sharded) == ["step-00000002", "step-00000003.damaged"]
    assert "__1_0.distcp: No such file" in said[0]


def test_a_sharded_checkpoint_has_no_file_of_weights_and_says_how_to_make_one(sharded, trained):
    with pytest.raises(CheckpointError, match=r"step-00000003 is sharded.*lmim convert"):
        folders.weights_file(folders.folder_of(sharded, 3))
    whole = folders.folder_of(trained[0] / "whole", 3)
    assert folders.weights_file(whole) == whole / "model.safetensors"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_shards_are_what_dcp_itself_reads(sharded, trained):
    expected = torch.load(trained[0] / "sharded.pt")
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, checkpoint_id=folders.folder_of(sharded, 3) / "shards", no_dist=True)
    assert_same(found, expected)


def test_an_index_that_would_run_code_is_refused(sharded, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run by the index"),)

    index = folders.folder_of(sharded, 3) / "shards" / shards.INDEX
    index.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"\.metadata is not an index of shards.*mkdir"):
        shards.read(index.parent)
    assert not (tmp_path / "run by the index").exists()
    index.write_bytes(pickle.dumps(torch.Size([3])))
    with pytest.raises(CheckpointError, match="it holds a Size"):
        shards.read(index.parent)


def test_an_index_that_names_files_elsewhere_is_refused(sharded):
    folder = folders.folder_of(sharded, 3) / "shards"
    metadata = pickle.loads((folder / shards.INDEX).read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../../" + place.relative_path
    (folder / shards.INDEX).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names files of other folders: \.\./\.\./__0_0"):
        shards.read(folder)


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_a_checkpoint_of_another_model_is_refused_by_the_names_of_its_tensors(trained, layout):
    opened = folders.open_verified(folders.latest(trained[0] / layout))
    with pytest.raises(CheckpointError, match=r"does not fit the model in \d+ tensors: blocks\.0\.weight"):
        content.restore(opened, *make(width=8))


def test_the_manifest_of_shards_lists_every_file(sharded):
    folder = folders.folder_of(sharded, 3)
    state = json.loads((folder / "state.json").read_text())
    assert state["layout"] == "sharded"
    assert sorted(state["files"]) == sorted(FILES[:3])
    assert sorted(path.name for path in (folder / "shards").iterdir()) == sorted(
        name.removeprefix("shards/") for name in FILES[:3]
    )
    for name, line in state["files"].items():
        assert files.describe(folder / name) == line
