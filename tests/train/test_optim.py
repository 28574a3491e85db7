import contextlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lmim_fast.config import ModelConfig, OptimConfig, PretrainConfig, RecognizerConfig
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.recognizer import Recognizer
from lmim_fast.train import optim

SMALL = ModelConfig(
    width=32,
    depth=1,
    heads=2,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=2,
    decoder_ffn=64,
)


def test_learning_rate_rises_from_zero_peaks_after_warmup_and_falls_along_a_half_cosine():
    rates = [optim.learning_rate(step, peak=2.0, warmup=4, total=12) for step in range(13)]
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.0)  # half way down
    assert rates[12] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_learning_rate_is_defined_when_the_warmup_is_as_long_as_the_run():
    assert optim.learning_rate(9, peak=1.0, warmup=10, total=10) == 0.9


def test_lr_is_taken_as_it_is_and_base_lr_is_scaled_by_the_batch():
    scaled = PretrainConfig(data=("x",), batch_size=512)
    given = PretrainConfig(data=("x",), batch_size=512, optim=OptimConfig(lr=1e-3))
    assert optim.peak_learning_rate(scaled) == pytest.approx(3e-4)
    assert optim.peak_learning_rate(given) == 1e-3


def test_steps_come_from_epochs_rounded_up_unless_they_are_given():
    epochs = PretrainConfig(data=("x",), batch_size=32, epochs=2.0, optim=OptimConfig(warmup_epochs=0.5))
    assert optim.total_steps(epochs, 100) == 7
    assert optim.warmup_steps(epochs, 100) == 2
    steps = PretrainConfig(data=("x",), batch_size=32, steps=5, optim=OptimConfig(warmup_steps=3))
    assert (optim.total_steps(steps, 100), optim.warmup_steps(steps, 100)) == (5, 3)


def test_tokens_and_matrices_decay_and_one_dimensional_tensors_do_not():
    model = LMIM(SMALL)
    decayed, plain = optim.decay_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    plain_names = {names[id(p)] for p in plain["params"]}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {"mask_token", "model_maeenc.cls_token", "decoder_embed.weight"} <= decayed_names
    assert {"decoder_norm.weight", "model_maeenc.blocks.0.attn.qkv.bias"} <= plain_names
    assert decayed_names | plain_names == {n for n, p in model.named_parameters() if p.requires_grad}


def test_position_tables_and_the_teacher_are_in_no_group():
    model = LMIM(SMALL)
    grouped = {id(p) for group in optim.decay_groups(model, 0.05) for p in group["params"]}
    frozen = [p for n, p in model.named_parameters() if "pos_embed" in n or "momentum" in n]
    assert len(frozen) > 2
    assert not grouped & {id(p) for p in frozen}


def _one_layer() -> tuple[nn.Linear, optim.SkippingAdamW]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = optim.make_optimizer(optim.decay_groups(layer, 0.05), OptimConfig())
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
    return layer, optimizer


def _backward(layer: nn.Linear, scale: float) -> None:
    layer.zero_grad()
    (layer(torch.ones(1, 3)).sum() * scale).backward()


def test_a_skipped_step_leaves_weights_moments_and_step_count_bitwise_unchanged():
    layer, optimizer = _one_layer()
    _backward(layer, 1.0)
    optimizer.step_unless(torch.tensor(0.0))
    weights = layer.weight.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[layer.weight].items()}
    _backward(layer, float("nan"))
    optimizer.step_unless(torch.tensor(1.0))
    assert torch.equal(layer.weight, weights)
    assert all(torch.equal(optimizer.state[layer.weight][k], v) for k, v in state.items())
    _backward(layer, 1.0)
    optimizer.step_unless(torch.tensor(0.0))
    assert not torch.equal(layer.weight, weights)


def test_an_update_equals_plain_adamw():
    layer, optimizer = _one_layer()
    other, _ = _one_layer()
    groups = optim.decay_groups(other, 0.05)
    plain = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for scale in (1.0, -0.5, 3.0):
        _backward(layer, scale)
        optimizer.step_unless(torch.tensor(0.0))
        _backward(other, scale)
        plain.step()
    torch.testing.assert_close(layer.weight, other.weight)
    torch.testing.assert_close(layer.bias, other.bias)


def test_clipping_scales_gradients_to_the_given_norm_and_leaves_small_ones_alone():
    layer, _ = _one_layer()
    _backward(layer, 1000.0)
    trained = list(layer.parameters())
    norm = optim.gradient_norm(trained)
    optim.clip_gradients(trained, norm, 2.0)
    assert norm > 1000
    assert optim.gradient_norm(trained).item() == pytest.approx(2.0, rel=1e-4)
    _backward(layer, 1e-3)
    before = layer.weight.grad.clone()
    optim.clip_gradients(trained, optim.gradient_norm(trained), 2.0)
    assert torch.equal(layer.weight.grad, before)


def test_the_average_of_the_weights_follows_them_and_a_skipped_step_leaves_it_alone():
    layer, optimizer = _one_layer()
    optimizer.average_decay = 0.75
    expected = layer.weight.detach().clone()
    for step in range(4):
        _backward(layer, 1.0 + step)
        optimizer.step_unless(torch.tensor(0.0))
        expected = 0.75 * expected + 0.25 * layer.weight.detach()
    torch.testing.assert_close(optimizer.state[layer.weight]["average"], expected)
    _backward(layer, float("nan"))
    optimizer.step_unless(torch.tensor(1.0))
    torch.testing.assert_close(optimizer.state[layer.weight]["average"], expected)


def test_averaged_weights_are_in_the_model_inside_the_block_only_also_after_an_error():
    layer, optimizer = _one_layer()
    optimizer.average_decay = 0.5
    for _ in range(3):
        _backward(layer, 1.0)
        optimizer.step_unless(torch.tensor(0.0))
    weights, average = layer.weight.detach().clone(), optimizer.state[layer.weight]["average"].clone()
    assert not torch.equal(weights, average)
    with contextlib.suppress(KeyError), optim.averaged_weights(optimizer):
        assert torch.equal(layer.weight, average)
        raise KeyError
    assert torch.equal(layer.weight, weights)
    assert torch.equal(optimizer.state[layer.weight]["average"], average)


def test_no_average_is_kept_unless_it_is_asked_for():
    layer, optimizer = _one_layer()
    _backward(layer, 1.0)
    optimizer.step_unless(torch.tensor(0.0))
    weights = layer.weight.detach().clone()
    with optim.averaged_weights(optimizer):
        assert torch.equal(layer.weight, weights)
    assert set(optimizer.state[layer.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_the_cosine_ends_at_the_final_rate():
    rates = [optim.learning_rate(step, peak=2.0, warmup=4, total=12, final=0.5) for step in range(13)]
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.25)  # half way down
    assert rates[12] == pytest.approx(0.5)


def test_one_cycle_is_that_of_torch():
    total, warmup, peak = 50, 15, 0.3
    layer = nn.Linear(1, 1)
    reference = torch.optim.SGD(layer.parameters(), lr=peak)
    # torch's two phases end at pct_start * total - 1 and at total - 1.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        reference, max_lr=peak, total_steps=total + 1, pct_start=(warmup + 1) / (total + 1)
    )
    for step in range(total + 1):
        ours = optim.learning_rate(step, peak=peak, warmup=warmup, total=total, schedule="one_cycle")
        assert ours == pytest.approx(schedule.get_last_lr()[0], rel=1e-6, abs=1e-12)
        reference.step()
        if step < total:
            schedule.step()


def test_a_group_has_its_own_share_of_the_rate():
    layer = nn.Linear(3, 2)
    groups = [{"params": [layer.weight], "lr_scale": 0.25}, {"params": [layer.bias]}]
    optimizer = optim.make_optimizer(groups, OptimConfig())
    optim.set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.5]


def test_layer_groups_are_those_of_the_released_fine_tuning(recorded: Path):
    model = Recognizer(RecognizerConfig())
    groups = optim.layer_groups(model, "encoder", 12, weight_decay=0.05, layer_decay=0.75)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    expected = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in json.loads((recorded / "finetune_param_groups.json").read_text())
        for name in group["names"]
    }
    assert ours.keys() == expected.keys()
    assert {name: pytest.approx(value) for name, value in ours.items()} == expected
