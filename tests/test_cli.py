import dataclasses
import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from pretrain_runs import ENVIRONMENT, options, write_lmdb
from safetensors.torch import load_file, save_file

import lmim_fast
from lmim_fast import cli
from lmim_fast.cli_options import parse
from lmim_fast.config import FinetuneConfig, PretrainConfig, recipe
from lmim_fast.errors import LmimError, UsageError, shared
from lmim_fast.models import weights
from lmim_fast.train.export import load_model
from lmim_fast.train.parallel import resolve
from lmim_fast.train.start import load_teacher
from lmim_fast.train.world import World


def parse_finetune(arguments):
    return parse(FinetuneConfig, ["--data", "x", *arguments], "lmim finetune", "about")


def parse_pretrain(arguments):
    return parse(PretrainConfig, arguments, "lmim pretrain", "about")


def error_of(capsys, arguments, code=2):
    """The one line on stderr of a command that must fail."""
    assert cli.main([str(argument) for argument in arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be >= 1, got 0"),
        (["--steps", "many"], "--steps"),
        (["--step", "3"], "--step"),
        (["--step", "3"], "did you mean"),
        (["--frobnicate"], "--frobnicate"),
        (["--steps", "3", "word"], "word"),
        (["--optim.lr", "-1"], "lr must be positive, got -1.0"),
        (["--optim.betas", "0.9", "1.5"], "betas must be in [0, 1)"),
        (["--model.width", "33"], "width 33 must be a multiple"),
        (["--precision", "fp8"], "fp8"),
        (["--batch-size"], "--batch-size"),
        (["--batch-size", "9", "--accumulation", "2"], "batch_size 9 must be a multiple of accumulation 2"),
        (["--preset", "huge"], "unknown preset 'huge'; choose from tiny, small, base"),
        (["--view.blur-sigma", "2", "1"], "blur_sigma must be (low, high)"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(capsys, arguments, message):
    error = error_of(capsys, ["pretrain", "--data", "x", *arguments])
    assert message in error
    assert len(error) < 250


def test_a_missing_option_is_named(capsys):
    assert "missing: --data" in error_of(capsys, ["pretrain"])
    assert "missing: SOURCE TARGET" in error_of(capsys, ["convert"])
    assert "missing: RUN" in error_of(capsys, ["report"])
    assert "at least one LMDB folder" in error_of(capsys, ["data", "inspect"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["pretrain"], "missing: --data"),
        (
            ["pretrain", "--data", "x", "--batch-size", "1e3"],
            "--batch-size: must be a whole number, got '1e3'",
        ),
        (["pretrain", "--data", "x", "--timeout", "q"], "--timeout: must be a number, got 'q'"),
        (["pretrain", "--data", "x", "--optim.lr", "q"], "--optim.lr: must be {None}|FLOAT, got 'q'"),
        (["pretrain", "--data", "x", "--seed", "-1"], "seed must be in"),
        (["pretrain", "--data", "x", "--optim.lr", "inf"], "--optim.lr must be a finite number, got inf"),
        (["finetune", "--data", "x", "--preset", "huge"], "unknown preset 'huge'"),
        (["convert"], "'source'"),
        (["convert", "run"], "'target'"),
        (["report"], "'run'"),
        (["data", "inspect"], "at least one LMDB folder"),
        (["data", "charset", "x", "--min-count", "0"], "min_count must be >= 1"),
        (["data", "render", "--count", "0"], "count must be >= 1"),
    ],
)
def test_an_unknown_option_and_another_problem_are_both_named(capsys, arguments, problem):
    error = error_of(capsys, [*arguments, "--frob=3"])
    assert problem in error
    assert "Unrecognized options: --frob" in error


def test_an_unknown_command_is_named(capsys):
    assert "unknown command 'frob'" in error_of(capsys, ["frob"])
    assert "unknown command 'data frob'" in error_of(capsys, ["data", "frob"])


def test_paths_that_hold_no_data_are_one_line(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        arguments = [
            "pretrain",
            "--data",
            tmp_path / name,
            "--output",
            tmp_path / "run",
            "--objective",
            "mae",
        ]
        assert str(tmp_path / name) in error_of(capsys, arguments)
        assert str(tmp_path / name) in error_of(capsys, ["data", "inspect", tmp_path / name])
        assert str(tmp_path / name) in error_of(capsys, ["data", "charset", tmp_path / name])
    assert not (tmp_path / "run").exists()


def test_a_forgotten_teacher_is_refused_before_anything_is_opened(capsys):
    error = error_of(capsys, ["pretrain", "--data", "absent"])
    assert error.startswith("error: no teacher: pass --teacher FILE")
    assert "--teacher random" in error


def test_a_teacher_that_nothing_reads_is_refused(capsys):
    arguments = ["pretrain", "--data", "absent", "--objective", "mae", "--teacher", "random"]
    assert "--objective mae has no teacher" in error_of(capsys, arguments)


def test_a_teacher_that_is_not_there_is_named(capsys, tmp_path):
    data = write_lmdb(tmp_path / "words", 4)
    arguments = options(data, tmp_path / "run", "--teacher", "nowhere.pth", objective="lmim")
    assert "nowhere.pth does not exist" in error_of(capsys, ["pretrain", *arguments])


def test_an_output_that_cannot_be_made_is_one_line(capsys, tmp_path):
    data = write_lmdb(tmp_path / "words", 4)
    (tmp_path / "file").write_text("")
    arguments = options(data, tmp_path / "file" / "run")
    assert "cannot be made (Not a directory)" in error_of(capsys, ["pretrain", *arguments])


def test_a_batch_that_cannot_be_shared_is_refused():
    config = parse_pretrain(["--data", "x", "--batch-size", "12", "--accumulation", "2"])
    with pytest.raises(UsageError, match="12 must be a multiple of 4 processes x 2 accumulation passes"):
        resolve(config, World(0, 4, torch.device("cpu")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there_is_one_line(capsys):
    arguments = ["pretrain", "--data", "x", "--objective", "mae", "--device", "cuda"]
    assert "--device cuda: no CUDA device" in error_of(capsys, arguments)


@pytest.mark.parametrize(
    "arguments",
    [["frob"], ["pretrain", "--frob"], ["pretrain", "--preset", "huge"]],
)
def test_the_first_rank_of_each_machine_prints_what_is_wrong_in_its_command_line(
    capsys, monkeypatch, arguments
):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(arguments) == 2
    machine = capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert (told, machine.endswith("(rank 5)\n")) == ("", True)


@pytest.mark.parametrize("kind", [LmimError, PermissionError])
def test_another_rank_prints_a_failure_that_the_first_one_does_not_know(capsys, monkeypatch, kind):
    def fail(*_):
        raise failure

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli, "_run", fail)
    failure = kind(13, "broken")
    assert cli.main([]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.endswith("(rank 3)\n")
    failure = shared(kind(13, "broken"))
    assert cli.main([]) == 1
    assert capsys.readouterr().err == ""


def test_a_full_disk_outside_a_checkpoint_is_one_line_too(capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "run/tensorboard")

    monkeypatch.setattr(cli, "_run", full)
    assert "No space left" in error_of(capsys, ["pretrain"], code=1)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_missing_permission_is_one_line(capsys, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "run/metrics.jsonl")

    monkeypatch.setattr(cli, "_run", refuse)
    told = error_of(capsys, ["pretrain"], code=1)
    assert "no permission: " in told
    assert "run/metrics.jsonl" in told


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_file_where_a_folder_of_the_run_should_be_is_noticed_before_training(tmp_path, capsys, name):
    data = write_lmdb(tmp_path / "words", 8)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("in the way")
    told = error_of(capsys, ["pretrain", *options(data, tmp_path / "run")])
    assert f"{tmp_path / 'run' / name} is in the way" in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_preset_is_chosen_first_and_single_values_override_it():
    config = parse_pretrain(
        ["--data", "a", "b", "--model.depth", "2", "--preset", "tiny", "--optim.lr", "1e-3"]
    )
    assert config.data == ("a", "b")
    assert (config.model.width, config.model.depth, config.optim.lr) == (96, 2, 1e-3)
    assert parse_pretrain(["--data", "a", "--preset=base"]).model.width == 768
    assert parse_pretrain(["--data", "a", "--no-resume"]).resume is False


def test_help_lists_commands_and_options_and_the_version_is_the_packages(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("pretrain", "data render", "data inspect", "convert", "report"))
    assert cli.main(["pretrain", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(
        name in shown for name in ("--data", "--teacher", "--model.width", "--optim.lr", "--loader.threads")
    )
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == lmim_fast.__version__


def test_a_reader_that_leaves_early_sees_no_traceback():
    command = f"{sys.executable} -m lmim_fast.cli pretrain --help | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: lmim pretrain")
    assert result.stderr == ""


def test_help_does_not_wait_for_torch():
    code = "import sys; from lmim_fast import cli; cli.main(['pretrain', '--help'])"
    code += "; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0


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


@pytest.mark.parametrize("start", ["from lmim_fast.cli import main; main(['--version'])", None])
@pytest.mark.parametrize(
    ("setting", "spins"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_openmp_threads_wait_as_chosen_before_torch_is_imported(start, setting, spins):
    module = "runpy.run_module('lmim_fast.pretrain', run_name='__main__')"
    run = start or f"import runpy; sys.argv = ['x', '--help']; {module}"
    code = f"""
import atexit, os, sys
atexit.register(lambda: print("SPINS", os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules))
{run}
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment | setting, capture_output=True, text=True, check=False
    )
    assert result.stdout.splitlines()[-1] == f"SPINS {spins} False", result.stderr


def test_a_recipe_gives_the_numbers_and_other_options_override_them():
    assert parse_finetune([]) == recipe("lmim", data=("x",))
    assert parse_finetune(["--recipe=strong", "--preset", "tiny"]) == recipe(
        "strong", data=("x",), size="tiny"
    )
    changed = parse_finetune(
        ["--optim.base-lr", "1e-3", "--recipe", "strong", "--augment.kind", "none", "--epochs", "2"]
    )
    strong = recipe("strong", data=("x",))
    assert changed.optim == dataclasses.replace(strong.optim, base_lr=1e-3)
    assert (changed.augment.kind, changed.epochs, changed.recipe) == ("none", 2.0, "strong")


def test_an_unknown_recipe_and_weights_of_another_number_are_one_line(capsys):
    told = error_of(capsys, ["finetune", "--data", "x", "--recipe", "best"])
    assert "unknown recipe 'best'; choose from lmim, strong" in told
    told = error_of(capsys, ["finetune", "--data", "x", "y", "--weights", "1"])
    assert "weights must be one number for each of 2 paths of data, got 1" in told
