import dataclasses
import errno
import os
import subprocess
import sys

import pytest
import torch
from one_line import error_of
from pretrain_runs import ENVIRONMENT, options, write_lmdb

import lmim_fast
from lmim_fast import cli
from lmim_fast.cli_options import parse
from lmim_fast.config import FinetuneConfig, PretrainConfig, recipe
from lmim_fast.errors import LmimError, UsageError, shared
from lmim_fast.train.parallel import resolve
from lmim_fast.train.world import World


def parse_finetune(arguments):
    return parse(FinetuneConfig, ["--data", "x", *arguments], "lmim finetune", "about")


def parse_pretrain(arguments):
    return parse(PretrainConfig, arguments, "lmim pretrain", "about")


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
