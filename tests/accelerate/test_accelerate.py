"""accelerate(model): the swapped model computes, trains and is stored as before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate_models import (
    FAMILIES,
    HEADS,
    WIDTH,
    Family,
    VisionTransformer,
    assert_same,
    distance,
    run,
    swapped,
    without_keys,
)
from torch import nn

from lmim_fast import accelerate
from lmim_fast.ops import dispatch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the ops that are run."""
    names: list[str] = []
    takes = dispatch.takes

    def counted(op: str, *arguments: Any) -> bool:
        names.append(op)
        return takes(op, *arguments)

    monkeypatch.setattr(dispatch, "takes", counted)
    return names


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_every_gradient_are_those_of_the_model_before(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    family = FAMILIES[name]
    model, original = swapped(family)
    x = family.input(dtype)
    assert_same(run(model.to(dtype), x), run(original.to(dtype), x), tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_without_gradients_gives_what_it_gave_before(name: str) -> None:
    """torch's layers run other code there: their native inference path."""
    family = FAMILIES[name]
    model, original = swapped(family)
    outputs = []
    with torch.no_grad():
        for each in (model.eval(), original.eval()):
            torch.manual_seed(3)
            outputs.append(each(family.input()))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_layers_of_the_known_families_run_their_fast_forms(name: str, calls: list[str]) -> None:
    family = FAMILIES[name]
    model = family.model()
    report = accelerate(model)
    torch.manual_seed(3)
    model(family.input())
    assert {row.note for row in report.swapped} <= {"", "its random_masking"}
    assert {row.kind for row in report.left} <= {"Conv2d", "Linear", "PatchEmbed", type(model).__name__}
    expected = {
        "torch": {"self_attention", "cross_attention", "dropout_add_layer_norm", "layer_norm"},
        "timm's": {"self_attention", "dropout_add_layer_norm", "layer_norm", "bias_gelu"},
        "public": {"self_attention", "dropout_add_layer_norm", "layer_norm", "bias_gelu", "select_patches"},
    }
    assert expected[name.split()[0]] <= set(calls)


def bf16_errors(family: Family, device: str) -> None:
    """Root mean square over several inputs (one ReLU that flips doubles the error of a single one).

    Never asked to be below one rounding.
    """
    model, original = (each.to(device) for each in swapped(family))
    found: dict[str, list[float]] = {}
    plain: dict[str, list[float]] = {}
    for seed in range(8):
        x = torch.randn(family.shape, generator=torch.Generator().manual_seed(seed)).to(device)
        exact = run(original, x)
        with torch.autocast(device, torch.bfloat16):
            runs = run(model, x), run(original, x)
        assert runs[0][0].dtype == runs[1][0].dtype
        for errors, (output, gradients) in zip((found, plain), runs, strict=True):
            errors.setdefault("output", []).append(distance(output.float(), exact[0]))
            for name, gradient in gradients.items():
                errors.setdefault(name, []).append(distance(gradient, exact[1][name]))
    for name, errors in found.items():
        mine, allowed = (torch.tensor(each).square().mean().sqrt() for each in (errors, plain[name]))
        assert mine <= 2 * max(allowed, torch.finfo(torch.bfloat16).eps / 2), name


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_autocast_is_at_most_twice_as_far_from_fp32_as_before(name: str) -> None:
    bf16_errors(FAMILIES[name], "cpu")


REAL = {
    "ViT-S": Family(lambda: VisionTransformer(384, 6, 2, 256), (16, 3, 64, 64)),
    "torch Transformer": FAMILIES["torch Transformer"],
    "torch Transformer, pre-norm": FAMILIES["torch Transformer, pre-norm"],
    "public MAE": FAMILIES["public MAE"],
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_bf16_autocast_on_a_device_is_at_most_twice_as_far_from_fp32_as_before(name: str) -> None:
    bf16_errors(REAL[name], "cuda")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_optimiser_made_before_goes_on_and_takes_the_same_steps(name: str) -> None:
    family = FAMILIES[name]
    models = [family.model(), family.model()]
    # Rounding of the key biases' gradients, which are zero, must not become whole steps: hence eps.
    optimisers = [torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4) for model in models]
    accelerate(models[0])
    losses: list[list[float]] = [[], []]
    for step in range(4):
        for model, optimiser, curve in zip(models, optimisers, losses, strict=True):
            torch.manual_seed(step)
            loss = model(family.input()).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            curve.append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (parameter_name, mine), expected in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        error = without_keys(parameter_name, mine - expected).abs().max()
        assert error <= 1e-5, parameter_name


@pytest.mark.parametrize("name", ["torch Transformer", "timm's ViT"])
def test_a_swapped_model_runs_the_kernels(name: str, calls: list[str]) -> None:
    """Backend "triton" refuses to run an op without its kernel."""
    family = FAMILIES[name]
    model, original = swapped(family)
    x = family.input()[:1]
    with dispatch.backend("triton"):
        output = model(x)
        gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    expected = original(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    plain = torch.autograd.grad(expected.square().sum(), list(original.parameters()))
    for (key, _), mine, right in zip(model.named_parameters(), gradients, plain, strict=True):
        assert distance(without_keys(key, mine), without_keys(key, right)) <= 1e-4, key
    assert {"self_attention", "dropout_add_layer_norm"} <= set(calls)


def dropping() -> list[nn.Module]:
    layers = [
        nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.25, batch_first=True),
        nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.25, "gelu", batch_first=True, norm_first=True),
    ]
    return [*layers, VisionTransformer(drop=0.25).blocks[0]]


@pytest.mark.parametrize("number", range(3))
def test_dropout_has_the_mean_and_spread_it_had_before_and_none_in_evaluation(number: int) -> None:
    """The same sequence many times in a batch."""
    layer, copies = dropping()[number], 4000
    original = copy.deepcopy(layer)
    accelerate(layer)
    x = torch.randn(1, 5, WIDTH).expand(copies, -1, -1)
    with torch.no_grad():
        mine, expected = layer(x), original(x)
        error = (mine.mean(0) - expected.mean(0)).abs()
        assert (error <= 5 * ((mine.var(0) + expected.var(0)) / copies).sqrt() + 1e-6).all()
        spread = mine.std(0).square().mean().sqrt() / expected.std(0).square().mean().sqrt()
        assert 0.97 < spread < 1.03
        torch.testing.assert_close(layer.eval()(x), original.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_mask_of_a_swapped_mae_is_the_one_that_was_drawn_before() -> None:
    model = FAMILIES["public MAE"].model()
    x = torch.randn(6, 16, WIDTH)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append((model.random_masking(x, 0.6), torch.rand(1)))
        accelerate(model)
    (kept, mask, restore), after = results[1]
    (expected, expected_mask, _), expected_after = results[0]
    assert torch.equal(mask, expected_mask)
    assert torch.equal(after, expected_after), "another number of random values was drawn"
    assert kept.shape == expected.shape
    padded = torch.cat([kept, torch.zeros(6, 16 - kept.shape[1], WIDTH)], 1)
    back = padded.gather(1, restore[..., None].expand(-1, -1, WIDTH))
    assert torch.equal(back, x * (1 - mask[..., None]))


def test_the_oracle_gives_the_same_losses_with_its_fast_forms() -> None:
    from lmim_fast.config import preset
    from lmim_fast.reference import ReferenceLMIM

    model = ReferenceLMIM(preset("tiny", decoder_dropout=0.0))
    images, guidance = torch.randn(2, 2, 3, 32, 128)
    noise = torch.rand(2, 256)
    expected = model(images, guidance, noise)
    report = accelerate(model, frozen=True)
    output = model(images, guidance, noise)
    names = {row.name for row in report.swapped}
    assert {"model_maeenc.blocks.0", "model_maeenc_momentum.blocks.0", "decoder_blocks.0"} <= names
    assert not [row for row in report.swapped if row.note]
    for key in ("loss_recon", "loss_align", "pred"):
        torch.testing.assert_close(getattr(output, key), getattr(expected, key), rtol=1e-5, atol=1e-5)
