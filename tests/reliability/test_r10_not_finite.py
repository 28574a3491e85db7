"""R10: what is not finite on one rank is skipped by all of them, and what was skipped can be replayed."""

import json

import pytest
import torch
from parallel_runs import batch_of, config_of
from pretrain_runs import lines, options, write_lmdb
from ranks import run_ranks
from recorded import recording
from torch.distributed.tensor import DTensor

from lmim_fast import cli
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.train import optim, parallel
from lmim_fast.train.step import TrainStep
from lmim_fast.train.tasks import make_task


def _tensors(model, optimizer):
    """This rank's part of weights, moments and averages, copied."""
    parts = [*model.parameters()]
    parts += [tensor for state in optimizer.state.values() for tensor in state.values()]
    return [(part.to_local() if isinstance(part, DTensor) else part).detach().clone() for part in parts]


def _skip(world):
    """Which of three steps changed anything on this rank; in the second something of rank 1 is not finite."""
    found, bad = {}, {"what": None}
    forward = LMIM.forward

    def poisoned(self, *inputs, **named):
        output = forward(self, *inputs, **named)
        if bad["what"] == "loss":  # its gradient stays finite
            output.loss_align = output.loss_align.detach() * float("nan")
        if bad["what"] == "gradient":
            output.loss.register_hook(lambda gradient: gradient * float("inf"))
        return output

    LMIM.forward = poisoned
    for mode in ("replicate", "shard"):
        for what in ("loss", "gradient"):
            config = config_of(parallel=mode)
            task = make_task(config)
            model = task.build().train()
            parallel.apply(model, config, world)
            optimizer = optim.make_optimizer(task.parameter_groups(model), config.optim)
            step = TrainStep(model, optimizer, task, world)
            changed, finite = [], []
            for number in range(3):
                bad["what"] = what if number == 1 and world.rank == 1 else None
                before = _tensors(model, optimizer)
                row = step(number, iter([batch_of(number, 0, world, 1)]), lr=1e-3)
                after = _tensors(model, optimizer)
                same = len(before) == len(after) and all(map(torch.equal, before, after))
                changed.append(not same)
                finite.append(bool(row.isfinite().all()))
            found[mode, what] = changed, finite
    LMIM.forward = forward
    return found


def test_r10_a_loss_or_gradient_that_is_not_finite_on_one_rank_is_skipped_by_both_in_every_form():
    ranks = run_ranks(_skip)
    wanted = ([True, False, True], [True, False, True])
    for rank in ranks:
        assert rank == {
            (mode, what): wanted for mode in ("replicate", "shard") for what in ("loss", "gradient")
        }


def test_r10_the_line_of_a_skipped_step_names_the_seed_and_the_samples_that_it_was_trained_on(
    tmp_path, monkeypatch
):
    data, run = write_lmdb(tmp_path / "words", 30), tmp_path / "run"
    forward, calls = MAE.forward, []

    def poisoned(self, *inputs, **named):
        output = forward(self, *inputs, **named)
        calls.append(None)
        if len(calls) in (4, 9):  # the second pass of step 2, the first of step 5
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(MAE, "forward", poisoned)
    (tmp_path / "recorded").mkdir()
    with recording(tmp_path / "recorded"):
        more = ("--accumulation", "2", "--seed", "7")
        assert cli.main(["pretrain", *options(data, run, *more, steps=6)]) == 0
    trained = {}
    for text in (tmp_path / "recorded" / "rank-0.jsonl").read_text().splitlines():
        line = json.loads(text)
        trained.setdefault(line["step"] + 1, []).extend(sample[:2] for sample in line["samples"])
    skipped = [json.loads(text) for text in (run / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped] == [2, 5]
    for line in skipped:
        assert line["seed"] == 7
        samples = zip(line["epochs"], line["indices"], strict=True)
        assert [list(sample) for sample in samples] == trained[line["step"]]
    assert lines(run)[-1]["skipped_steps"] == 2


@pytest.mark.parametrize(("steps", "first", "end"), [(50, 6, 40), (6, 0, 6)], ids=["many", "all"])
def test_r10_too_many_skipped_steps_stop_a_run_however_seldom_it_logs(
    tmp_path, monkeypatch, capsys, steps, first, end
):
    data, run = write_lmdb(tmp_path / "words", 30), tmp_path / "run"
    forward, calls = MAE.forward, []

    def poisoned(self, *inputs, **named):
        output = forward(self, *inputs, **named)
        calls.append(None)
        if first < len(calls) <= first + 20:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(MAE, "forward", poisoned)
    more = ("--log-every", "1000", "--checkpoint-every", "1000")
    assert cli.main(["pretrain", *options(data, run, *more, steps=steps)]) == 1
    lost = min(20, steps)
    told = capsys.readouterr().err
    assert f"not finite in {lost} steps in a row up to step {end}, which trained nothing" in told
    skipped = [json.loads(text) for text in (run / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped] == list(range(first + 1, first + 1 + lost))
    assert not (run / "encoder.safetensors").exists()
    assert not list(run.glob("checkpoints/*"))
