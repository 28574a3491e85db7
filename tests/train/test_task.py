"""What a task is to the rest of the trainer, for every objective in the table."""

import dataclasses
import string
from typing import get_args

import pytest
import torch

from lmim_fast.config import (
    FinetuneConfig,
    ModelConfig,
    Objective,
    PretrainConfig,
    RecognizerConfig,
    RunConfig,
    recipe,
)
from lmim_fast.errors import UsageError
from lmim_fast.models.lmim import LMIM
from lmim_fast.ops.masking import mask_noise, select_patches
from lmim_fast.ops.philox import Stream
from lmim_fast.train import optim
from lmim_fast.train.tasks import TASKS, make_task

MODEL = ModelConfig(
    **dict(width=32, depth=1, heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2),
    **dict(decoder_ffn=64, mae_decoder_depth=1, decoder_dropout=0.0),
)
CPU = torch.device("cpu")


READER = RecognizerConfig(
    encoder=MODEL,
    **dict(decoder_width=32, decoder_depth=1, decoder_heads=1, decoder_head_dim=32, decoder_ffn=32),
)


def config_of(objective: str, **changes: object) -> RunConfig:
    if objective == "recognizer":
        return FinetuneConfig(data=("x",), model=READER, batch_size=3, **changes)
    return PretrainConfig(data=("x",), objective=objective, model=MODEL, batch_size=3, **changes)


def test_every_objective_has_a_task() -> None:
    assert set(TASKS) == set(get_args(Objective))


@pytest.mark.parametrize("objective", list(TASKS))
def test_losses_are_named_and_the_first_carries_the_gradient(objective: str) -> None:
    task = make_task(config_of(objective, precision="fp32"))
    model = task.build()
    losses = task.losses(model, task.blank_batch(3, CPU))
    assert losses.shape == (len(task.loss_names),)
    assert task.loss_names[0] == "loss"
    losses[0].backward()
    assert any(parameter.grad is not None for parameter in task.encoder(model).parameters())


@pytest.mark.parametrize("objective", list(TASKS))
def test_a_model_is_that_of_the_seed_and_leaves_torchs_generator_alone(objective: str) -> None:
    task_of = make_task(config_of(objective))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (make_task(config_of(objective, seed=seed)).build() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    token = [task_of.encoder(model).cls_token for model in (first, again, other)]
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


def test_the_recogniser_has_as_many_classes_as_its_characters_give() -> None:
    task = make_task(config_of("recognizer", charset="36"))
    assert (task.config.model.classes, task.config.characters) == (39, string.printable[:36])
    assert task.build().config.classes == 39
    again = make_task(task.config)
    assert again.config == task.config
    wrong = dataclasses.replace(config_of("recognizer"), model=dataclasses.replace(READER, classes=50))
    with pytest.raises(UsageError, match=r"--model\.classes 50: the 94 characters of --charset 94"):
        make_task(wrong)


def test_facts_say_the_recipe_and_what_was_changed_in_it() -> None:
    plain = recipe("strong", data=("x",), size="tiny")
    assert make_task(plain).facts()["recipe"] == "strong, unchanged"
    changed = dataclasses.replace(plain, epochs=3.0, optim=dataclasses.replace(plain.optim, lr=0.1), seed=4)
    assert make_task(changed).facts()["recipe"] == "strong, changed: epochs 3.0, optim.lr 0.1"
    assert make_task(changed).facts()["starts from"] == "random weights"


def test_the_recipes_have_the_published_numbers() -> None:
    lmim = recipe("lmim", data=("x",))
    assert optim.peak_learning_rate(lmim) == pytest.approx(2e-4)  # batch 512
    assert (lmim.optim.betas, lmim.optim.weight_decay, lmim.optim.warmup_epochs) == ((0.9, 0.999), 0.05, 1.0)
    assert (lmim.optim.layer_decay, lmim.optim.final_lr, lmim.epochs, lmim.augment.kind) == (
        *(0.75, 1e-6, 10.0, "abinet"),
    )
    strong = dataclasses.replace(recipe("strong", data=("x",)), batch_size=1024)
    assert optim.peak_learning_rate(strong) == pytest.approx(6.5e-4)
    assert (strong.optim.schedule, strong.optim.warmup_epochs, strong.optim.layer_decay) == (
        "one_cycle",
        1.5,
        1,
    )
    assert (strong.epochs, strong.augment.kind, strong.model.max_length) == (10.0, "parseq", 25)


def test_an_init_that_is_not_there_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match="--init gone does not exist"):
        make_task(config_of("recognizer", init="gone")).check()
