"""`lmim data inspect --replay`: the sample is the one of training, bit for bit."""

import json

import cv2
import finetune_runs
import pytest
import torch
from pretrain_runs import options, write_lmdb

from lmim_fast import cli
from lmim_fast.cli_options import parse
from lmim_fast.config import FinetuneConfig, PretrainConfig
from lmim_fast.models.mae import MAE
from lmim_fast.report.replay import replay_sample
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World

CPU = World(0, 1, torch.device("cpu"))


def trained(task, store, steps):
    """(epoch, index) -> the tensors that a step reads of it, and the patches that it masks."""
    found = {}
    with task.pipeline(store, task.order(store), CPU, 0, steps) as batches:
        for batch in batches:
            views = batch.views()
            masks = (
                task.draw_patches(batch.epochs, batch.indices)[1] if hasattr(task, "draw_patches") else None
            )
            for row, key in enumerate(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)):
                found[key] = [None if view is None else view[row] for view in views]
                found[key] += [None if masks is None else masks[row]]
    return found


def assert_replayed(task, store, steps):
    samples = trained(task, store, steps)
    replayed = {}
    for (epoch, index), (plain, second, mask) in samples.items():
        sample = replayed[epoch, index] = replay_sample(task, store, epoch, index)
        shown = sample.second if task.without_augmentation() else sample.plain
        assert torch.equal(shown, plain), (epoch, index)
        if second is not None:
            assert torch.equal(sample.second, second)
        if mask is not None:
            assert torch.equal(sample.ids_masked, mask)
    return replayed


@pytest.mark.parametrize("objective", ["lmim", "mae"])
def test_views_and_mask_are_those_of_the_batches_substitutes_too(tmp_path, objective):
    data = write_lmdb(tmp_path / "words", 14, broken=(2, 5, 9))
    more = ["--loader.max-bad-fraction", "1", "--seed", "5"]
    more += ["--teacher", "random"] if objective == "lmim" else []
    arguments = options(data, tmp_path / "run", *more, objective=objective)
    task = make_task(parse(PretrainConfig, arguments, "lmim pretrain", ""))
    store = task.records(lambda _: None)
    samples = assert_replayed(task, store, 3)
    assert {1, 4, 8} < {index for _, index in samples}
    sample = replay_sample(task, store, 0, 4)
    assert sample.source not in (1, 4, 8)
    assert sample.broken == "truncated"
    assert bool(sample.operations) == (objective == "lmim")
    assert replay_sample(task, store, 0, 0).broken is None
    store.close()


@pytest.mark.filterwarnings("ignore:.*some lack image or label")
def test_mixed_and_augmented_crops_of_fine_tuning_are_those_of_the_batches(tmp_path):
    one = finetune_runs.write_words(tmp_path / "one", 9, broken=(3,))
    two = finetune_runs.write_words(tmp_path / "two", 7, words=[None, "cat", "dog"], broken=(4,))
    more = ["--weights", "1", "2", "--loader.max-bad-fraction", "1", "--data", str(two)]  # after `one`
    for recipe in ("lmim", "strong"):
        arguments = finetune_runs.options(one, tmp_path / "run", "--recipe", recipe, *more)
        task = make_task(parse(FinetuneConfig, arguments, "lmim finetune", ""))
        store = task.records(lambda _: None)
        samples = assert_replayed(task, store, 4)
        broken = {key: sample for key, sample in samples.items() if sample.broken}
        assert broken
        for (_, index), sample in broken.items():  # of the same path of data
            assert (index < 9) == (sample.source < 9)
        store.close()


def test_a_sample_of_a_skipped_step_is_shown_from_its_run_folder(tmp_path, monkeypatch, capsys):
    data, run = write_lmdb(tmp_path / "words", 30, broken=(4,)), tmp_path / "run"
    forward, calls, seen = MAE.forward, [], []

    def poisoned(self, images, **named):
        output = forward(self, images, **named)
        calls.append(None)
        if len(calls) == 2:
            seen.append(images.clone())
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(MAE, "forward", poisoned)
    more = ("--seed", "7", "--loader.max-bad-fraction", "1")
    assert cli.main(["pretrain", *options(data, run, *more, steps=3)]) == 0
    assert f"lmim data inspect --run {run} --replay SEED EPOCH INDEX" in " ".join(
        capsys.readouterr().out.split()
    ).replace("\n", "")
    (line,) = [json.loads(text) for text in (run / "skipped.jsonl").read_text().splitlines()]
    task = make_task(parse(PretrainConfig, options(data, run, *more, steps=3), "lmim pretrain", ""))
    store = task.records(lambda _: None)
    for row, (epoch, index) in enumerate(zip(line["epochs"], line["indices"], strict=True)):
        assert torch.equal(replay_sample(task, store, epoch, index).plain, seen[0][row])
    store.close()

    epoch, index = line["epochs"][3], line["indices"][3]
    picture, before = tmp_path / "replay.png", sorted(run.rglob("*"))
    numbers = [str(line["seed"]), str(epoch), str(index)]
    shown = ["data", "inspect", "--run", str(run), "--output", str(picture), "--replay", *numbers]
    assert cli.main(shown) == 0
    out = capsys.readouterr().out
    assert f"seed 7, epoch {epoch}, index {index}\n" in out
    assert f"record: {data} image-{index + 1:09d}\n" in out
    assert "mask: 192 of 256 patches are masked" in out
    assert "note" not in out
    assert "warning" not in out
    assert min(cv2.imread(str(picture)).shape[:2]) > 300
    assert sorted(run.rglob("*")) == before

    assert cli.main([*shown[:-3], "8", str(epoch), str(index)]) == 0
    assert "note: the seed of the run is 7" in capsys.readouterr().out
    other = write_lmdb(tmp_path / "other", 31)
    assert cli.main(["data", "inspect", str(other), *shown[2:]]) == 0
    assert "the data is no longer what the run was trained on" in capsys.readouterr().out


def test_a_database_alone_replays_lmim_and_names_the_substitute_and_the_operations(tmp_path, capsys):
    data, picture = write_lmdb(tmp_path / "words", 9, broken=(4,)), tmp_path / "replay.png"
    arguments = ["data", "inspect", str(data), "--output", str(picture), "--replay", "3", "1"]
    assert cli.main([*arguments, "3"]) == 0
    out = capsys.readouterr().out
    assert f"broken: {data} image-000000004: truncated; its substitute is index " in out
    assert "guidance view:\n  1. " in out
    assert "resize to the view's size" in out
    assert "mask: 205 of 256 patches are masked" in out
    assert cli.main([*arguments, "3", "--view.min-operations", "10", "--view.max-operations", "10"]) == 0
    assert " 10. " in capsys.readouterr().out
    assert cli.main([*arguments, "9"]) == 2
    assert "index 9 is outside of the 9 records" in capsys.readouterr().err
    assert cli.main(["data", "inspect", "--run", str(tmp_path), "--replay", "0", "0", "0"]) == 2
    assert "config.json does not exist" in capsys.readouterr().err
    assert cli.main(["data", "inspect"]) == 2
    assert "name at least one LMDB folder" in capsys.readouterr().err


def test_a_record_of_the_skip_list_is_named_and_a_list_that_is_gone_is_a_warning(tmp_path, capsys):
    data = write_lmdb(tmp_path / "words", 30, broken=(4,))
    run, output = tmp_path / "run", tmp_path / "verified"
    assert cli.main(["data", "verify", str(data), "--output", str(output)]) == 0
    skip = output / "skip.txt"
    assert cli.main(["pretrain", *options(data, run, "--loader.skip", str(skip), steps=1)]) == 0
    shown = ["data", "inspect", "--run", str(run), "--output", str(tmp_path / "replay.png")]
    capsys.readouterr()
    assert cli.main([*shown, "--replay", "0", "0", "3"]) == 0
    listed = capsys.readouterr().out
    assert f"broken: {data} image-000000004: on the skip list, truncated; its substitute is index " in listed

    skip.unlink()
    assert cli.main([*shown, "--replay", "0", "0", "3"]) == 0
    met = capsys.readouterr().out
    assert f"warning: the skip list {skip} is not there, so only broken records are replaced" in met
    assert (
        met.replace("image-000000004: ", "image-000000004: on the skip list, ").splitlines()[2:]
        == (listed.splitlines()[1:])
    )
