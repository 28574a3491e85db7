"""`lmim doctor` on a run: its data, disk, batches and steps, each with what is wrong with it."""

import json
import shutil
import time
from collections import namedtuple
from types import SimpleNamespace

import finetune_runs
import pytest
import torch
from pretrain_runs import options, write_lmdb

from lmim_fast import cli, durable
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.doctor import dry_run, step
from lmim_fast.doctor.disk import check_disk
from lmim_fast.doctor.findings import Findings
from lmim_fast.models.mae import MAE
from lmim_fast.train.step import TrainStep

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Batches are counted, and steps timed, for a moment only."""
    monkeypatch.setattr(dry_run, "_SECONDS", 0.1)
    monkeypatch.setattr(step, "_BUDGET", 0.5)


@pytest.fixture
def doctor(tmp_path, capsys):
    """Run the command: its exit code, and its findings by name, levels and texts with their advice."""

    def run(*arguments):
        file = tmp_path / "findings.json"
        capsys.readouterr()
        code = cli.main(["doctor", *map(str, arguments), "--json", str(file)])
        document, found = json.loads(file.read_text()), {}
        for entry in document["findings"]:
            found.setdefault(entry["what"], []).append((entry["level"], f"{entry['text']} {entry['advice']}"))
        out = capsys.readouterr().out
        assert len(out.splitlines()) == len(document["findings"]) + 1
        assert code == (1 if document["errors"] else 0)
        return code, found, document["figures"]

    return run


def level(found, what):
    return [entry[0] for entry in found[what]]


def test_a_good_run_has_time_memory_and_disk_and_nothing_is_written(tmp_path, doctor):
    data, run = write_lmdb(tmp_path / "words", 40), tmp_path / "run"
    code, found, figures = doctor("pretrain", *options(data, run, "--teacher", "random", objective="lmim"))
    assert code == 0
    for name in ("config", "--data", "records", "model", "disk", "batches", "step", "time"):
        assert level(found, name) == ["ok"], name
    assert "batch 8 (processes x passes x images: 1 x 1 x 8)" in found["config"][0][1]
    assert "40 records; 40 decoded, all good" in found["--data"][0][1]
    assert level(found, "weights") == ["warning"]  # a random teacher
    assert figures["steps"] == 12
    assert figures["run_seconds"] == pytest.approx(12 * figures["step_seconds"])
    assert figures["images_per_second"] == pytest.approx(8 / figures["step_seconds"])
    assert figures["memory_peak_bytes"] > 0
    assert not run.exists()


def test_the_share_of_a_process_is_measured_and_the_passes_are_counted(tmp_path, doctor):
    data = write_lmdb(tmp_path / "words", 40)
    more = ("--batch-size", "48", "--accumulation", "2", "--processes", "3")
    _, found, figures = doctor("pretrain", *options(data, tmp_path / "run", *more))
    assert "3 x 2 x 8" in found["config"][0][1]
    assert "a pass of 8 images" in found["step"][0][1]
    assert "over 3 processes" in found["time"][0][1]
    assert figures["images_per_second"] == pytest.approx(48 / figures["step_seconds"])
    _, found, _ = doctor("pretrain", *options(data, tmp_path / "run", "--processes", "3"))
    assert level(found, "config") == ["error", "ok"]
    assert "is no multiple of 3 x 1" in found["config"][0][1]


def test_a_large_batch_is_cut_on_a_cpu_and_scaled(tmp_path, doctor, monkeypatch):
    monkeypatch.setattr(step, "_BUDGET", 0.0)
    data = write_lmdb(tmp_path / "words", 40)
    code, found, figures = doctor("pretrain", *options(data, tmp_path / "run", "--batch-size", "64"))
    assert code == 0
    assert "a pass of 64 images takes" in found["step"][0][1]
    assert "scaled from passes of 4 images" in found["step"][0][1]
    assert figures["images_per_second"] > 0


def test_broken_databases_are_named_and_the_good_ones_are_looked_at_too(tmp_path, doctor):
    good, wrong = write_lmdb(tmp_path / "a", 20), write_lmdb(tmp_path / "b", 20, claimed=25)
    short = write_lmdb(tmp_path / "c", 60)
    content = (short / "data.mdb").read_bytes()
    (short / "data.mdb").write_bytes(content[: len(content) // 2])
    paths = ("--data", str(wrong), str(short))  # after `good`
    code, found, _ = doctor("pretrain", *options(good, tmp_path / "run", *paths))
    assert code == 1
    assert level(found, "--data") == ["ok", "error", "error"]
    assert "num-samples says 25, but the last image is image-000000020" in found["--data"][1][1]
    assert "cut short" in found["--data"][2][1]
    assert "records" not in found
    assert "of zeros" in found["step"][0][1]


def test_many_broken_records_are_an_error_and_a_few_a_warning(tmp_path, doctor):
    half = write_lmdb(tmp_path / "half", 40, broken=tuple(range(1, 41, 2)))
    code, found, _ = doctor("pretrain", *options(half, tmp_path / "run"))
    assert code == 1
    assert level(found, "--data") == ["warning", "error"]
    assert "20 of 40 are broken (50.0%), for example image-000000001: truncated" in found["--data"][0][1]
    assert "50.0% of the records are broken, a run stops above 10.0%" in found["--data"][1][1]
    assert level(found, "batches") == level(found, "step") == ["ok"]
    code, found, _ = doctor("pretrain", *options(half, tmp_path / "run", "--loader.max-bad-fraction", "0.6"))
    assert code == 0
    assert level(found, "--data") == ["warning"]


def test_records_on_the_skip_list_are_not_broken_ones_and_a_wrong_list_is_an_error(tmp_path, doctor):
    half = write_lmdb(tmp_path / "half", 40, broken=tuple(range(1, 41, 2)))
    assert cli.main(["data", "verify", str(half), "--output", str(tmp_path / "verified")]) == 0
    skip = tmp_path / "verified" / "skip.txt"
    arguments = options(half, tmp_path / "run", "--loader.skip", str(skip))
    code, found, _ = doctor("pretrain", *arguments)
    assert code == 0
    assert level(found, "--data") == ["ok"]
    assert "40 records, 20 of them on the skip list; 20 decoded, all good" in found["--data"][0][1]
    assert found["skip list"] == [("ok", "20 of 40 records are never read ")]

    with skip.open("a") as file:
        file.write(f"other@{'0' * 32}\timage-000000001\n")
    code, found, _ = doctor("pretrain", *arguments)
    assert code == 1
    assert level(found, "skip list") == ["error"]
    assert "no database of this run is other@" in found["skip list"][0][1]

    skip.write_text("nonsense\n")
    code, found, _ = doctor("pretrain", *arguments)
    assert code == 1
    assert "line 1: 'nonsense' is not NAME@HASH" in found["skip list"][0][1]


def test_a_disk_that_cannot_flush_is_a_warning_that_says_what_may_be_lost(tmp_path, monkeypatch):
    plan = SimpleNamespace(config=SimpleNamespace(output=str(tmp_path / "run")), model=None)
    findings = Findings()
    monkeypatch.setattr(durable, "refusal", lambda _: "Invalid argument")
    check_disk(plan, findings)
    (found,) = findings.entries
    assert (found.level, found.what) == ("warning", "disk")
    assert f"the file system of {tmp_path} cannot flush folders (Invalid argument)" in found.text


def test_a_full_disk_is_an_error_before_the_run_and_its_own_checkpoints_count(tmp_path, doctor, monkeypatch):
    data, run = write_lmdb(tmp_path / "words", 20), tmp_path / "run"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40, 1000))
    code, found, figures = doctor("pretrain", *options(data, run))
    assert code == 1
    assert level(found, "disk") == ["error"]
    assert "lower --keep-checkpoints" in found["disk"][0][1]
    more = ("--keep-every", "4", "--optim.ema-decay", "0.9")
    larger = doctor("pretrain", *options(data, run, *more))[2]["disk_needed_bytes"]
    assert larger > 1.5 * figures["disk_needed_bytes"]

    monkeypatch.undo()
    monkeypatch.setattr(dry_run, "_SECONDS", 0.1)
    assert cli.main(["pretrain", *options(data, run)]) == 0
    written = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    estimate = figures["disk_needed_bytes"]
    assert (
        0.7 * estimate < written * 5 / 4 < 1.3 * estimate
    )  # three checkpoints are there, and no fourth in flight


def test_a_run_folder_is_checked_for_its_rest_and_stays_as_it_is(tmp_path, doctor):
    data, run = write_lmdb(tmp_path / "words", 20), tmp_path / "run"
    arguments = options(data, run, "--teacher", "random", objective="lmim")
    assert cli.main(["pretrain", *arguments]) == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, found, figures = doctor(run)
    assert code == 0
    assert "goes on from step 12 with its own weights and teacher" in found["weights"][0][1]
    assert "has made its 12 steps" in found["time"][0][1]
    assert figures["disk_free_bytes"] > 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    assert "4 steps left of 12" in doctor(run)[1]["time"][0][1]
    assert doctor(run / "config.json")[0] == 0


def test_a_fine_tuning_run_tells_of_its_labels_and_validation_data(tmp_path, doctor):
    data = finetune_runs.write_words(tmp_path / "words", 30)
    missing = tmp_path / "missing"
    code, found, _ = doctor("finetune", *finetune_runs.options(data, tmp_path / "run", "--val", str(missing)))
    assert code == 1
    assert "30 records with labels" in found["--data"][0][1]
    assert level(found, "labels") == level(found, "step") == ["ok"]
    assert level(found, "--val") == ["error"]
    assert str(missing) in found["--val"][0][1]


def test_no_teacher_and_a_wrong_init_are_errors_and_the_step_is_made(tmp_path, doctor):
    data = write_lmdb(tmp_path / "words", 20)
    code, found, _ = doctor("pretrain", *options(data, tmp_path / "run", objective="lmim"))
    assert code == 1
    assert level(found, "weights") == ["error"]
    assert "--teacher" in found["weights"][0][1]
    assert level(found, "time") == ["ok"]
    code, found, _ = doctor("pretrain", *options(data, tmp_path / "run", "--init", str(tmp_path / "none")))
    assert code == 1
    assert "does not exist" in found["weights"][0][1]


def test_a_step_that_does_not_fit_is_an_error_with_an_option(tmp_path, doctor, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(TrainStep, "__call__", full)
    data = write_lmdb(tmp_path / "words", 20)
    code, found, _ = doctor("pretrain", *options(data, tmp_path / "run"))
    assert code == 1
    ((worst, text),) = found["step"]
    assert worst == "error"
    assert "out of memory with 8 images a pass" in text
    assert "--accumulation 2" in text
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_an_error(tmp_path, doctor, monkeypatch):
    forward = MAE.forward

    def poisoned(self, *inputs, **named):
        output = forward(self, *inputs, **named)
        output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(MAE, "forward", poisoned)
    data = write_lmdb(tmp_path / "words", 20)
    code, found, _ = doctor("pretrain", *options(data, tmp_path / "run"))
    assert code == 1
    assert level(found, "step") == ["ok", "error"]
    assert "not finite" in found["step"][1][1]


def test_slow_data_is_named_as_the_bottleneck(tmp_path, doctor, monkeypatch):
    following = ViewPipeline.__next__

    def slow(self):
        time.sleep(0.02)
        return following(self)

    monkeypatch.setattr(ViewPipeline, "__next__", slow)
    monkeypatch.setattr(step, "measure", lambda *_: step.Measured(8, 0.001, 2**20, 2**30, True))
    data = write_lmdb(tmp_path / "words", 20)
    code, found, figures = doctor("pretrain", *options(data, tmp_path / "run"))
    assert code == 0
    assert level(found, "speed") == ["warning"]
    assert "data is the bottleneck" in found["speed"][0][1]
    assert figures["images_per_second"] < figures["data_images_per_second"] < 401


def test_wrong_paths_of_the_command_are_one_line(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "none")]) == 2
    assert "does not exist; give the folder of a run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"config": 3}')
    assert cli.main(["doctor", str(tmp_path)]) == 1
    assert "is not a config of this version" in capsys.readouterr().err
    assert cli.main(["doctor", str(tmp_path), str(tmp_path)]) == 2
    assert "one run" in capsys.readouterr().err
    assert cli.main(["doctor", "--json", str(tmp_path / "none" / "file.json")]) == 2
    assert cli.main(["doctor", "pretrain"]) == 2
    assert "--data" in capsys.readouterr().err


def test_doctor_is_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["doctor"]) == 2
    assert "without torchrun" in capsys.readouterr().err
