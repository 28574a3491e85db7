"""Whole runs in this process, on a real LMDB through the real pipeline."""

import contextlib
import errno
import json
import os
import shutil

import pytest
import torch
from pretrain_runs import curve, lines, options, weights_of, write_lmdb
from safetensors.torch import load_file

from lmim_fast import cli
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.data.store.records import RecordStore
from lmim_fast.models.mae import MAE
from lmim_fast.train.checkpoint import content, folders, resume
from lmim_fast.train.checkpoint.saver import Saver
from lmim_fast.train.telemetry import Telemetry
from lmim_fast.train.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 30)


@pytest.fixture(scope="module")
def mae(data, tmp_path_factory):
    """A finished run of the MAE stage."""
    run = tmp_path_factory.mktemp("runs") / "mae"
    assert pretrain(options(data, run, steps=30)) == 0
    return run


def pretrain(arguments):
    return cli.main(["pretrain", *arguments])


def only_error(capsys):
    """The one line that went to stderr."""
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ")
    assert "\n" not in text
    return text


def test_the_mae_stage_lowers_its_loss_and_leaves_a_complete_run_folder(mae):
    found = lines(mae)
    assert [line["step"] for line in found] == list(range(1, 31))
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]
    assert {name for line in found for name in line if "loss" in name} == {"loss"}
    assert found[-1]["epoch"] == pytest.approx(30 * 8 / 30)
    assert found[-1]["images_per_second"] > 0
    assert all(0 <= line["data_wait_fraction"] <= 1 for line in found)
    content = json.loads((mae / "config.json").read_text())
    assert set(content) == {"config", "versions", "data"}
    assert content["config"]["model"]["width"] == 32
    assert content["data"]["count"] == 30
    assert list((mae / "tensorboard").iterdir())
    steps = sorted(path.name for path in (mae / "checkpoints").iterdir())
    assert steps == ["step-00000024", "step-00000028", "step-00000030"]


def test_lmim_learns_from_the_teacher_that_the_mae_stage_made(data, mae, tmp_path):
    run = tmp_path / "lmim"
    arguments = options(data, run, "--teacher", str(mae), objective="lmim", steps=16)
    assert pretrain(arguments) == 0
    found = lines(run)
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert all(
        line["loss"] == pytest.approx(line["loss_recon"] + line["loss_align"], rel=1e-5) for line in found
    )
    assert all(line["loss_align"] > 0 for line in found)
    teacher, made = load_file(run / "teacher.safetensors"), load_file(mae / "encoder.safetensors")
    assert set(teacher) == set(made)
    assert all(torch.equal(teacher[name], made[name]) for name in made)  # frozen to the last step


def test_bf16_follows_fp32_closely_and_keeps_fp32_weights(data, mae, tmp_path):
    run = tmp_path / "bf16"
    assert pretrain(options(data, run, "--precision", "bf16", steps=4)) == 0
    for low, full in zip(lines(run), lines(mae), strict=False):
        assert low["loss"] == pytest.approx(full["loss"], rel=2e-2)
    assert [line["loss"] for line in lines(run)] != [line["loss"] for line in lines(mae)[:4]]
    stored = load_file(run / "checkpoints" / "step-00000004" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_r16_accumulated_passes_give_the_curve_of_the_whole_batch(data, mae, tmp_path):
    run = tmp_path / "accumulated"
    assert pretrain(options(data, run, "--accumulation", "2", steps=30)) == 0
    for parts, whole in zip(lines(run), lines(mae), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-2)


def test_clipping_bounds_the_update_but_reports_the_true_norm(data, mae, tmp_path):
    run = tmp_path / "clipped"
    assert pretrain(options(data, run, "--optim.clip-norm", "0.001", steps=30)) == 0
    assert lines(run)[0]["grad_norm"] == lines(mae)[0]["grad_norm"]
    assert lines(run)[0]["grad_norm"] > 0.001
    assert weights_of(run, 30) != weights_of(mae, 30)


def test_the_student_can_start_from_an_encoder_file(data, mae, tmp_path):
    run = tmp_path / "continued"
    arguments = options(data, run, "--init", str(mae / "encoder.safetensors"), "--optim.lr", "1e-9", steps=1)
    assert pretrain(arguments) == 0
    made, kept = load_file(mae / "encoder.safetensors"), load_file(run / "encoder.safetensors")
    assert all(torch.equal(made[name], kept[name]) for name in made)


def test_broken_records_are_replaced_counted_and_named(tmp_path, capsys):
    data = write_lmdb(tmp_path / "words", 40, broken=(7, 31))
    assert pretrain(options(data, tmp_path / "run", "--loader.max-bad-fraction", "0.3", steps=15)) == 0
    entries = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert {entry["key"] for entry in entries} == {"image-000000007", "image-000000031"}
    assert all(entry["database"].endswith("words") and entry["reason"] for entry in entries)
    assert lines(tmp_path / "run")[-1]["bad_records"] == 2
    assert "2 broken records were replaced" in capsys.readouterr().out


def test_too_many_broken_records_stop_the_run_with_one_line(tmp_path, capsys):
    data = write_lmdb(tmp_path / "words", 40, broken=tuple(range(1, 21)))
    assert pretrain(options(data, tmp_path / "run", steps=15)) == 1
    assert "--loader.max-bad-fraction" in only_error(capsys)


def test_broken_records_are_named_before_a_run_ends_for_too_many_of_them(tmp_path, capsys):
    data = write_lmdb(tmp_path / "words", 40, broken=tuple(range(1, 21)))
    assert pretrain(options(data, tmp_path / "run", "--log-every", "1000", steps=15)) == 1
    assert "--loader.max-bad-fraction" in only_error(capsys)
    entries = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert len({entry["key"] for entry in entries}) > 0.1 * 40
    assert all(entry["reason"] for entry in entries)


def test_broken_records_are_named_with_each_checkpoint(tmp_path, monkeypatch):
    data = write_lmdb(tmp_path / "words", 8, broken=(3,))  # met in the first batch, which is all of them
    named, save = [], Saver.save

    def look(self, state, *parts):
        named.append((state["step"], (tmp_path / "run" / "bad_records.jsonl").exists()))
        save(self, state, *parts)

    monkeypatch.setattr(Saver, "save", look)
    more = ("--log-every", "1000", "--loader.max-bad-fraction", "0.5")
    assert pretrain(options(data, tmp_path / "run", *more, steps=5)) == 0
    assert named[0] == (4, True)


def test_what_can_fail_on_one_rank_before_training_is_done_together(data, mae, tmp_path, monkeypatch):
    depth, seen, together = [0], [], World.together

    @contextlib.contextmanager
    def entered(self):
        with together(self):
            depth[0] += 1
            try:
                yield
            finally:
                depth[0] -= 1

    def watch(owner, name):
        function = getattr(owner, name)

        def watched(*parts, **more):
            seen.append((name, owner, depth[0] > 0))
            return function(*parts, **more)

        monkeypatch.setattr(owner, name, watched)

    run = tmp_path / "run"
    shutil.copytree(mae, run)  # a run to continue: every step is taken
    monkeypatch.setattr(World, "together", entered)
    for owner, name in (
        (RecordStore, "fingerprint"),
        (folders, "read"),
        (resume, "check_same_run"),
        (MAE, "to"),
        (content, "restore"),
        (Telemetry, "__init__"),
        (ViewPipeline, "__init__"),
    ):
        watch(owner, name)
    assert pretrain(options(data, run, steps=30)) == 0
    assert {name for name, _, _ in seen} >= {
        "fingerprint",
        "read",
        "check_same_run",
        "to",
        "restore",
        "__init__",
    }
    assert len([name for name, _, _ in seen if name == "__init__"]) == 2
    assert all(inside for _, _, inside in seen), seen


def test_a_cuda_graph_is_refused_on_a_cpu(data, tmp_path, capsys):
    assert pretrain(options(data, tmp_path / "run", "--cuda-graph", "on")) == 2
    assert "--cuda-graph on is for CUDA, not for cpu: drop it" in only_error(capsys)
    assert not (tmp_path / "run").exists()


def test_a_wrong_number_of_samples_is_one_clear_line(tmp_path, capsys):
    data = write_lmdb(tmp_path / "words", 10, claimed=12)
    assert pretrain(options(data, tmp_path / "run")) == 1
    assert "num-samples says 12, but the last image is image-000000010" in only_error(capsys)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_size_is_refused_with_names_and_shapes(data, mae, tmp_path, capsys):
    arguments = options(
        data, tmp_path / "run", "--teacher", str(mae), "--model.width", "64", objective="lmim"
    )
    assert pretrain(arguments) == 1
    error = only_error(capsys)
    assert "cls_token [1, 1, 32] instead of [1, 1, 64]" in error
    assert not (tmp_path / "run").exists()


@pytest.fixture
def poison(monkeypatch):
    """Make the losses of some forward passes, counted from 1, not finite."""

    def start(steps, calls=[0]):  # noqa: B006
        forward, calls[0] = MAE.forward, 0

        def poisoned(self, images, noise=None, *, patches=None):
            calls[0] += 1
            output = forward(self, images, noise, patches=patches)
            if calls[0] in steps:
                output.loss = output.loss * float("nan")
            return output

        monkeypatch.setattr(MAE, "forward", poisoned)

    return start


def test_r10_a_step_that_is_not_finite_is_skipped_counted_and_can_be_replayed(data, mae, tmp_path, poison):
    poison({5, 6})
    run = tmp_path / "run"
    assert pretrain(options(data, run, steps=30)) == 0
    found = lines(run)
    assert curve(run)[:4] == curve(mae)[:4]
    assert [line["loss"] is None for line in found[3:8]] == [False, True, True, False, False]
    assert found[-1]["skipped_steps"] == 2
    assert found[-1]["loss"] < found[0]["loss"]  # it still trains
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in skipped] == [5, 6]
    assert all(len(entry["indices"]) == len(entry["epochs"]) == 8 for entry in skipped)
    stored = load_file(run / "checkpoints" / "step-00000030" / "optimizer.safetensors")
    assert stored["step.norm.weight"] == 28


def test_r10_steps_that_are_never_finite_stop_the_run_with_a_message(data, tmp_path, poison, capsys):
    poison(set(range(3, 100)))
    assert pretrain(options(data, tmp_path / "run", steps=60)) == 1
    assert "not finite in 20 steps in a row up to step 22" in only_error(capsys)


def test_r08_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoint_to_continue_from(
    data, mae, tmp_path, monkeypatch, capsys
):
    run, fsync = tmp_path / "run", os.fsync

    def full(descriptor):
        if "step-00000008.tmp" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert pretrain(options(data, run, steps=30)) == 1
    assert "disk full while writing" in only_error(capsys)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert pretrain(options(data, run, steps=30)) == 0
    assert curve(run) == curve(mae)
    assert weights_of(run, 30) == weights_of(mae, 30)
