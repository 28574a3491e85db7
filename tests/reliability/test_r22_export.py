"""R22: what comes out of a run that was sharded and saved sharded is the weights, bit for bit."""

import pytest
import torch
import warm
from pretrain_runs import options, write_lmdb
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from lmim_fast import cli
from lmim_fast.train.checkpoint import folders, shards

STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two processes that shared the model and its checkpoints."""
    folder = tmp_path_factory.mktemp("sharded")
    data = write_lmdb(folder / "words", 30)
    more = ("--teacher", "random", "--parallel", "shard", "--checkpoint-layout", "sharded")
    arguments = options(data, folder / "run", *more, objective="lmim", steps=STEPS)
    warm.finish(["pretrain", *arguments])
    return folder / "run"


@pytest.fixture(scope="module")
def trained(run):
    """Its weights as DCP, which wrote them, reads them, and its teacher."""
    folder = folders.folder_of(run, STEPS) / "shards"
    names = {name: size for name, size in shards.sizes(folder).items() if name.startswith("model.")}
    found = {name: torch.full(size, torch.nan, dtype=dtype) for name, (size, dtype) in names.items()}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    student = {name.removeprefix("model."): tensor for name, tensor in found.items()}
    teacher = load_file(run / "teacher.safetensors")
    return student | {f"model_maeenc_momentum.{name}": tensor for name, tensor in teacher.items()}


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_r22_the_encoder_of_a_sharded_run_has_the_bits_of_its_shards(run, trained, tmp_path):
    assert cli.main(["convert", str(run), str(tmp_path / "encoder.safetensors")]) == 0
    prefix = "model_maeenc."
    encoder = {name.removeprefix(prefix): t for name, t in trained.items() if name.startswith(prefix)}
    for path in (tmp_path / "encoder.safetensors", run / "encoder.safetensors"):
        assert_same_bits(load_file(path), encoder)


def test_r22_the_released_layout_of_a_sharded_run_has_the_bits_of_its_shards(run, trained, tmp_path):
    assert cli.main(["convert", str(run), str(tmp_path / "released.pth")]) == 0
    assert_same_bits(torch.load(tmp_path / "released.pth", weights_only=True)["model"], trained)


def test_r22_weights_of_a_sharded_run_that_are_not_finite_are_refused(run, tmp_path, monkeypatch, capsys):
    read = shards.read

    def poisoned(folder):
        tensors = read(folder)
        tensors["model.model_maeenc.norm.weight"][3] = torch.inf
        return tensors

    monkeypatch.setattr(shards, "read", poisoned)
    assert cli.main(["convert", str(run), str(tmp_path / "encoder.safetensors")]) == 1
    assert "not exported: non-finite values in" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
