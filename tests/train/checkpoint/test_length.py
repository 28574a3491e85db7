"""Whether a run may go on to another number of steps."""

import dataclasses
from pathlib import Path

import pytest

from lmim_fast.config import OptimConfig, PretrainConfig
from lmim_fast.config.io import to_dict
from lmim_fast.errors import UsageError
from lmim_fast.train.checkpoint import length
from lmim_fast.train.checkpoint.folders import Checkpoint

RECORDS = 50
CONFIG = PretrainConfig(
    data=("a",), output="runs/x", steps=100, batch_size=5, optim=OptimConfig(lr=1e-4, warmup_steps=10)
)


def checked(step, **values):
    """What the run says when it goes on from `step` with other values."""
    said = []
    path = Path(f"runs/x/checkpoints/step-{step:08d}")
    saved = Checkpoint(path, {"step": step, "config": to_dict(CONFIG)}, {}, {})
    optim = values.pop("optim", None)
    if optim is not None:
        saved.state["config"]["optim"] = to_dict(optim)
        values["optim"] = optim
    length.check(saved, dataclasses.replace(CONFIG, **values), RECORDS, said.append)
    return said


def test_a_finished_cosine_goes_on_and_says_what_the_learning_rate_does():
    # 90 steps of 190 into the cosine: 1e-4 * (1 + cos(90 / 190 * pi)) / 2.
    assert checked(100, steps=200) == [
        "runs/x was finished after 100 steps and goes on to 200: the learning rate goes from 3.05e-08 at "
        "step 100 to 5.41e-05 at step 101, the cosine of 200 steps"
    ]


@pytest.mark.parametrize("step", [40, 100])
@pytest.mark.parametrize("values", [{}, {"steps": None, "epochs": 10.0}], ids=["same", "as epochs"])
def test_the_same_length_in_other_words_is_the_same_run(step, values):
    assert checked(step, **values) == []


@pytest.mark.parametrize(
    ("step", "values", "told"),
    [
        (
            40,
            {"steps": 200},
            "runs/x stands at step 40 of 100, --steps 200 would change its learning rate half way: go on "
            "with --steps 100, and when it is finished pass a larger number; or start anew in another "
            "--output",
        ),
        (
            40,
            {"steps": None, "epochs": 20.0},
            "runs/x stands at step 40 of 100, --epochs 20 (200 steps) would change its learning rate half "
            "way: go on with --steps 100, and when it is finished pass a larger number; or start anew in "
            "another --output",
        ),
        (
            100,
            {"steps": 50},
            "runs/x has finished its 100 steps, --steps 50 is fewer: there is nothing left to do; for a "
            "shorter run choose another --output",
        ),
        (
            100,
            {"steps": 200, "optim": OptimConfig(lr=1e-4, warmup_steps=10, schedule="one_cycle")},
            "runs/x has finished its 100 steps, and the schedule one_cycle ends there: it cannot go on to "
            "200; start a new run from its weights, --init runs/x --output NEW, whose learning rate rises "
            "and falls again",
        ),
    ],
)
def test_a_length_that_fits_no_learning_rate_is_refused_with_what_can_be_done(step, values, told):
    with pytest.raises(UsageError) as caught:
        checked(step, **values)
    assert str(caught.value) == told
