"""What a task is to the rest of the trainer, for every objective in the table."""

import dataclasses
from typing import get_args

import pytest
import torch

from lmim_fast.config import ModelConfig, Objective, PretrainConfig
from lmim_fast.errors import UsageError
from lmim_fast.models.lmim import LMIM
from lmim_fast.ops.masking import mask_noise, select_patches
from lmim_fast.ops.philox import Stream
from lmim_fast.train.task import TASKS, make_task

MODEL = ModelConfig(
    **dict(width=32, depth=1, heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2),
    **dict(decoder_ffn=64, mae_decoder_depth=1, decoder_dropout=0.0),
)
CPU = torch.device("cpu")


def config_of(objective: str, **changes: object) -> PretrainConfig:
    return PretrainConfig(data=("x",), objective=objective, model=MODEL, batch_size=3, **changes)


def test_every_objective_has_a_task() -> None:
    assert set(TASKS) == set(get_args(Objective))


@pytest.mark.parametrize("objective", list(TASKS))
def test_losses_are_named_and_the_first_carries_the_gradient(objective: str) -> None:
    task = make_task(config_of(objective, precision="fp32"))
    model = task.build()
    losses = task.losses(model, task.blank_batch(CPU))
    assert losses.shape == (len(task.loss_names),)
    assert task.loss_names[0] == "loss"
    losses[0].backward()
    assert any(parameter.grad is not None for parameter in task.encoder(model).parameters())


@pytest.mark.parametrize("objective", list(TASKS))
def test_a_model_is_that_of_the_seed_and_leaves_torchs_generator_alone(objective: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (make_task(config_of(objective, seed=seed)).build() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    token = [model.mask_token for model in (first, again, other)]
    assert torch.equal(token[0], token[1])
    assert not torch.equal(token[0], token[2])


@pytest.mark.parametrize(
    ("objective", "stream", "visible"), [("lmim", Stream.MASK, 51), ("mae", Stream.MAE_MASK, 64)]
)
def test_masks_are_those_of_the_objectives_stream(objective: str, stream: Stream, visible: int) -> None:
    epochs, indices = torch.tensor([0, 0, 1]), torch.tensor([4, 5, 4])
    patches = make_task(config_of(objective, seed=9)).draw_patches(epochs, indices)
    expected = select_patches(mask_noise(9, epochs, indices, 256, stream), visible)
    assert all(torch.equal(ids, other) for ids, other in zip(patches, expected, strict=True))


@pytest.mark.parametrize(
    ("objective", "target", "teacher", "message"),
    [
        ("lmim", "teacher", None, "no teacher: pass --teacher FILE"),
        ("lmim", "pixel", "random", "--model.target pixel has no teacher"),
        ("mae", "teacher", "random", "--objective mae has no teacher"),
    ],
)
def test_a_teacher_that_is_forgotten_or_not_read_is_refused(objective, target, teacher, message) -> None:
    model = dataclasses.replace(MODEL, target=target)
    config = dataclasses.replace(config_of(objective, teacher=teacher), model=model)
    with pytest.raises(UsageError, match=message):
        make_task(config).check()


def test_the_student_and_not_the_teacher_is_the_encoder_of_lmim() -> None:
    task = make_task(config_of("lmim", teacher="random"))
    model = task.build()
    assert isinstance(model, LMIM)
    assert task.encoder(model) is model.model_maeenc
    assert task.facts() == {"masked": "80% of 256 patches", "teacher": "random"}
    assert make_task(config_of("mae")).facts() == {"masked": "75% of 256 patches"}
