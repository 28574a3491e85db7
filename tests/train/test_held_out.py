"""The loss of held-out crops: real LMDBs, real pipelines, one process and two."""

import dataclasses
import json
import threading

import finetune_runs
import pretrain_runs
import pytest
import torch
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard

from lmim_fast import faults
from lmim_fast.config import AugmentConfig, FinetuneConfig, ModelConfig, PretrainConfig, RecognizerConfig
from lmim_fast.data.order import SampleOrder
from lmim_fast.errors import LmimError, UsageError
from lmim_fast.train.held_out import HeldOut
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World

ALONE = World(0, 1, torch.device("cpu"))
SMALL = ModelConfig(
    **dict(width=32, depth=1, heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2),
    **dict(decoder_ffn=64, mae_decoder_depth=1, decoder_dropout=0.1),
)
READER = RecognizerConfig(
    encoder=SMALL,
    **dict(decoder_width=32, decoder_depth=1, decoder_heads=1, decoder_head_dim=32, decoder_ffn=32),
    **dict(dropout=0.1, drop_path=0.3, label_smoothing=0.1, max_length=8),
)
CROPS = 13  # no multiple of a batch, nor of two processes
OBJECTIVES = ("lmim", "mae", "recognizer")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """LMDBs of held-out crops, one of the plain ones cut."""
    root = tmp_path_factory.mktemp("held_out")
    pretrain_runs.write_lmdb(root / "plain", CROPS, broken=(5,))
    finetune_runs.write_words(root / "labelled", CROPS)
    return root


def config_of(data, run, objective, **changes):
    run.mkdir(exist_ok=True)
    settings = dict(
        **dict(data=("elsewhere",), output=str(run), batch_size=8, precision="fp32", seed=3, eval_every=5),
        **dict(eval_data=(str(data / ("labelled" if objective == "recognizer" else "plain")),)),
    )
    if objective == "recognizer":
        augment = AugmentConfig(kind="abinet")
        config = FinetuneConfig(
            objective="recognizer", model=READER, augment=augment, weights=(1.0,), **settings | changes
        )
    else:
        teacher = "random" if objective == "lmim" else None
        config = PretrainConfig(objective=objective, teacher=teacher, model=SMALL, **settings | changes)
    return type(make_task(config)).settle(config)


def built(config):
    task = make_task(config)
    return task, task.build().train()


def one_by_one(task):
    """(k,) mean losses of passes of one crop each, by a pipeline of their own."""
    plain = task.without_augmentation() or task
    changes = {"data": task.config.eval_data, "batch_size": 1}
    if isinstance(task.config, FinetuneConfig):
        changes["weights"] = ()
    plain = type(task)(dataclasses.replace(plain.config, **changes))
    store = plain.records(print)
    model = plain.build().eval()
    with torch.no_grad(), plain.pipeline(store, SampleOrder(CROPS, 1, 3), ALONE, 0, CROPS) as batches:
        losses = [plain.losses(model, batch) for batch in batches]
    store.close()
    return torch.stack(losses).double().mean(0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_mean_of_single_crops_and_measuring_changes_nothing(data, tmp_path, objective):
    task, model = built(config_of(data, tmp_path, objective))
    expected = dict(zip(task.loss_names, one_by_one(task).tolist(), strict=True))
    held_out = HeldOut(task, ALONE)
    frozen = next(model.children()).eval()  # a module's own mode
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    line = held_out(model, 5)
    assert held_out.images == CROPS
    assert line.pop("step") == 5
    assert line == pytest.approx(expected, rel=1e-5)
    assert held_out(model, 10) == {"step": 10, **line}, "the same bits at another step"
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not frozen.training


def test_views_are_made_once_and_no_thread_is_left(data, tmp_path):
    task, model = built(config_of(data, tmp_path, "lmim"))
    before = set(threading.enumerate())
    held_out = HeldOut(task, ALONE)
    assert set(threading.enumerate()) == before
    (data / "plain").rename(data / "away")
    try:
        assert held_out(model, 5)["loss"] > 0
    finally:
        (data / "away").rename(data / "plain")


def test_fewer_crops_than_a_batch_are_enough_and_more_than_there_are_is_no_error(data, tmp_path):
    task, model = built(config_of(data, tmp_path, "mae", batch_size=64, eval_images=3))
    assert HeldOut(task, ALONE).images == 3
    whole, model = built(config_of(data, tmp_path, "mae", batch_size=64))
    assert HeldOut(whole, ALONE)(model, 1)["loss"] != HeldOut(task, ALONE)(model, 1)["loss"]


def test_it_is_due_every_so_many_steps_and_at_the_end(data, tmp_path):
    held_out = HeldOut(make_task(config_of(data, tmp_path, "mae")), ALONE)
    assert [step for step in range(1, 13) if held_out.is_due(step, total=12)] == [5, 10, 12]


def test_lines_of_steps_that_are_made_again_are_replaced(data, tmp_path):
    task, model = built(config_of(data, tmp_path, "mae", eval_images=2))
    held_out, path = HeldOut(task, ALONE), tmp_path / "eval.jsonl"
    lines = [held_out(model, step) for step in (5, 10, 15)]
    path.write_bytes(path.read_bytes() + b'\xff{"step": 2')  # as a cut write leaves it
    held_out(model, 10)
    assert [json.loads(text) for text in path.read_text().splitlines()] == lines[:2]


def test_a_loss_that_is_not_finite_is_a_line_without_a_number(data, tmp_path):
    task, model = built(config_of(data, tmp_path, "mae", eval_images=2))
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    assert HeldOut(task, ALONE)(model, 5) == {"step": 5, "loss": None}
    assert json.loads((tmp_path / "eval.jsonl").read_text()) == {"step": 5, "loss": None}


def test_what_is_wrong_with_held_out_labels_is_said(data, tmp_path):
    words = [*finetune_runs.WORDS[:5], None]
    folder = finetune_runs.write_words(tmp_path / "words", 12, words=words)
    said = []
    config = config_of(data, tmp_path / "run", "recognizer", eval_data=(str(folder),))
    with pytest.warns(UserWarning, match="lack image or label"):
        held_out = HeldOut(make_task(config), ALONE, said.append)
    assert held_out.images == 10
    assert said[0] == "held-out labels: 10 of 12 records are trained on"


def test_a_path_without_records_is_a_wrong_option(data, tmp_path):
    with pytest.raises(UsageError, match=r"^--eval-data .*no LMDB here"):
        HeldOut(make_task(config_of(data, tmp_path, "mae", eval_data=(str(tmp_path),))), ALONE)


def _sharded(data, run, world):
    """Lines of a model split over the ranks, then with halved weights, then of the whole halved model."""
    task, model = built(config_of(data, run, "mae"))
    held_out = HeldOut(task, world)
    fully_shard(model, reshard_after_forward=False)
    parameters = list(model.parameters())  # the shards, as an optimiser has them
    lines = [held_out(model, 1)]
    _halve(parameters)
    lines.append(held_out(model, 2))
    task, whole = built(task.config)
    _halve(whole.parameters())
    return [*lines, held_out(whole, 2)]


def _halve(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.5)


def _rank(world, data, run):
    found = {}
    for objective in OBJECTIVES:
        for images in (1, CROPS):
            task, model = built(config_of(data, run, objective, eval_images=images))
            found[objective, images] = HeldOut(task, world)(model, images)
    found["sharded"] = _sharded(data, run, world)
    held_out = HeldOut(task, world)
    with faults.injected(faults.Fault("evaluation", "raise", rank=1)):
        try:
            held_out(model, 20)
        except (RuntimeError, LmimError) as error:
            found["fault"] = str(error)
    return found


def test_two_processes_measure_what_one_does_and_fail_together(data, tmp_path):
    run = tmp_path / "two"
    ranks = run_ranks(_rank, data, run)
    assert "injected at evaluation" in ranks[1].pop("fault")
    assert ranks[0].pop("fault").endswith("(rank 1)")
    assert ranks[0] == ranks[1]
    sharded, halved, whole = ranks[0].pop("sharded")
    assert sharded == ranks[0]["mae", CROPS] | {"step": 1}
    assert halved == whole != sharded, "gathered weights of the last measurement were used again"
    for (objective, images), line in ranks[0].items():
        task, model = built(config_of(data, tmp_path / "one", objective, eval_images=images))
        assert line == pytest.approx(HeldOut(task, ALONE)(model, images), rel=1e-5)
    assert len((run / "eval.jsonl").read_text().splitlines()) == 2
