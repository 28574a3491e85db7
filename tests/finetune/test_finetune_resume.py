"""A fine-tuning that is killed continues as if it had not been: curve, validation, weights, average."""

import pytest
import torch
from finetune_runs import kill_at, options, validation, write_words
from pretrain_runs import curve, weights_of

from lmim_fast import cli

STEPS = 14  # checkpoints at 4, 8, 12, 14; validations at 3, 6, 9, 12, 14


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed processes: the order of sums is the same
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("recipe", ["lmim", "strong"])
def test_r01_fine_tuning_after_kill_9_is_bitwise_equal(tmp_path, recipe):
    data, held = write_words(tmp_path / "data", 30), write_words(tmp_path / "held", 9)
    more = ["--recipe", recipe, "--val", str(held), "--validate-every", "3", "--optim.ema-decay", "0.9"]
    more += ["--model.drop-path", "0.1", "--log-every", "3"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(["finetune", *options(data, whole, *more, steps=STEPS)]) == 0
    arguments = options(data, run, *more, steps=STEPS)
    kill_at(11, arguments)
    assert validation(run)[-1]["step"] == 9  # past the checkpoint of step 8
    assert cli.main(["finetune", *arguments]) == 0
    assert curve(run) == curve(whole)
    assert validation(run) == validation(whole)
    assert weights_of(run, STEPS) == weights_of(whole, STEPS)
    for name in ("recognizer.safetensors", "best/recognizer.safetensors", "wrong_readings.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
