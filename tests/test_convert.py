"""`lmim convert`, and which weights of a run are taken."""

import os
import shutil

import pytest
import torch
from one_line import error_of
from pretrain_runs import options, write_lmdb
from safetensors.torch import load_file, save_file

from lmim_fast import cli
from lmim_fast.errors import UsageError
from lmim_fast.models import weights
from lmim_fast.train.export import load_model
from lmim_fast.train.start import load_teacher


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished LMIM run of two steps."""
    folder = tmp_path_factory.mktemp("convert")
    data = write_lmdb(folder / "words", 8)
    arguments = options(data, folder / "run", "--teacher", "random", objective="lmim", steps=2)
    assert cli.main(["pretrain", *arguments, "--checkpoint-every", "1"]) == 0
    return folder / "run"


def test_r22_a_run_converts_to_the_released_layout_and_back_bit_for_bit(run, tmp_path, capsys):
    target = tmp_path / "released.pth"
    assert cli.main(["convert", str(run), str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    content = torch.load(target, weights_only=True)
    model, config = load_model(run)
    own = model.state_dict()
    assert set(content) == {"model"}
    assert set(content["model"]) == set(own)
    assert all(torch.equal(value, own[name]) for name, value in content["model"].items())
    fresh = type(model)(config.model)
    weights.load_released(target, fresh)
    assert all(torch.equal(value, own[name]) for name, value in fresh.state_dict().items())


def test_r22_an_encoder_comes_out_of_a_run_a_checkpoint_folder_and_a_pth_alike(run, tmp_path):
    assert cli.main(["convert", str(run), str(tmp_path / "released.pth")]) == 0
    assert cli.main(["convert", str(run), str(tmp_path / "a.safetensors")]) == 0
    newest = run / "checkpoints" / "step-00000002"
    assert cli.main(["convert", str(newest), str(tmp_path / "b.bin"), "--to", "encoder"]) == 0
    assert cli.main(["convert", str(tmp_path / "released.pth"), str(tmp_path / "c.safetensors")]) == 0
    made = load_file(run / "encoder.safetensors")
    for name in ("a.safetensors", "b.bin", "c.safetensors"):
        (tmp_path / name).rename(tmp_path / "encoder.safetensors")
        found = load_file(tmp_path / "encoder.safetensors")
        assert set(found) == set(made)
        assert all(torch.equal(value, made[key]) for key, value in found.items())
    assert cli.main(["convert", str(run), str(tmp_path / "first.safetensors"), "--step", "1"]) == 0
    first = load_file(tmp_path / "first.safetensors")
    assert not all(torch.equal(value, made[key]) for key, value in first.items())


def test_the_newest_weights_of_a_run_are_taken_and_named(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    made = copy / "encoder.safetensors"
    newest = copy / "checkpoints" / "step-00000002"
    encoder = load_model(copy)[0].get_submodule("model_maeenc")

    def said(name):
        lines = []
        load_teacher(str(name), encoder, lines.append)
        return lines

    # A copy of the folder may have other times: steps count, and times only for an export without its step.
    os.utime(made, ns=(0, 0))
    assert said(copy) == [f"teacher {made} (of step 2)"]
    tensors = load_file(made)
    made.write_bytes(weights.encoder_safetensors(tensors, 1))
    assert said(copy) == [f"teacher {newest} (the export {made} is of step 1)"]
    save_file(tensors, made)
    assert said(copy) == [f"teacher {made}"]
    os.utime(made, ns=(0, 0))
    assert said(copy) == [f"teacher {newest} ({newest} is newer than {made}, by the times of the files)"]
    first = copy / "checkpoints" / "step-00000001"
    assert said(first) == [f"teacher {first}"]
    wanted = load_file(first / "model.safetensors")
    assert all(torch.equal(t, wanted["model_maeenc." + name]) for name, t in encoder.state_dict().items())
    with pytest.raises(UsageError, match="is a folder, and ::ema names one of the models in a file"):
        said(f"{copy}::ema")
    (newest / "model.safetensors").write_bytes(b"")
    assert cli.main(["convert", str(copy), str(tmp_path / "first.safetensors")]) == 0
    told = capsys.readouterr().err
    assert f"{newest / 'model.safetensors'} has 0 bytes" in told
    assert f"first.safetensors: step 1 of {copy}\n" in told


def test_a_file_that_the_released_class_cannot_load_is_said_when_it_is_written(run, tmp_path, capsys):
    assert cli.main(["convert", str(run), str(tmp_path / "released.pth")]) == 0
    told = capsys.readouterr().err
    assert (
        "its decoder's feed-forward is 2048 wide, here it is 64 (decoder_blocks.0.linear1.weight [64, 32])"
        in told
    )
    assert "step 2 of" in told
    assert "--model.decoder-heads 2 instead of 16" in told


def test_conversions_that_cannot_be_are_one_line(run, tmp_path, capsys):
    encoder, target = run / "encoder.safetensors", tmp_path / "x.pth"
    assert "holds an encoder only" in error_of(capsys, ["convert", encoder, target])
    assert "does not exist" in error_of(capsys, ["convert", tmp_path / "absent", target])
    assert "pass --to" in error_of(capsys, ["convert", run, tmp_path / "x"])
    assert "exists; choose another name" in error_of(capsys, ["convert", run, encoder])
    assert "is not a folder" in error_of(capsys, ["convert", run, tmp_path / "no" / "x.pth"])
    assert f"{run} is a folder, and ::ema" in error_of(capsys, ["convert", f"{run}::ema", target])
    assert "is for run folders" in error_of(capsys, ["convert", encoder, target, "--step", "1"])
    told = error_of(capsys, ["convert", run, target, "--step", "9"])
    assert "has no checkpoint of step 9; --step may be 1, 2" in told
    assert "is not the folder of a run" in error_of(capsys, ["convert", tmp_path, target])
    assert not target.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_r22_weights_that_are_not_finite_are_not_converted(run, tmp_path, capsys, value):
    state = load_model(run)[0].state_dict()
    state["model_maeenc.norm.weight"][3] = value
    torch.save({"model": state}, tmp_path / "bad.pth")
    encoder = load_file(run / "encoder.safetensors")
    encoder["norm.weight"][3] = value
    save_file(encoder, tmp_path / "bad.safetensors")
    for source, target in (("bad.pth", "x.pth"), ("bad.pth", "x.safetensors"), ("bad.safetensors", "y.bin")):
        arguments = ["convert", tmp_path / source, tmp_path / target]
        arguments += ["--to", "encoder"] if target == "y.bin" else []
        assert "not exported: non-finite values in" in error_of(capsys, arguments, code=1)
        assert not (tmp_path / target).exists()
