"""accelerate(model): the swapped model computes, trains and is stored as before."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate_models import (
    FAMILIES,
    HEADS,
    WIDTH,
    Family,
    VisionTransformer,
    accelerated,
    assert_same,
    distance,
    encoder_layer,
    run,
    swapped,
    without_keys,
)
from foreign_layers import CastingNorm, DropPath, LayerScale
from torch import nn

from benchmarks.operation import launches
from lmim_fast.ops import attention, dispatch

EVERY = pytest.mark.parametrize("name", FAMILIES)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@EVERY
def test_outputs_and_every_gradient_are_those_of_the_model_before(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    family = FAMILIES[name]
    model, original = swapped(family)
    x = family.input(dtype)
    assert_same(run(model.to(dtype), x), run(original.to(dtype), x), tolerance)


@EVERY
def test_evaluation_without_gradients_gives_what_it_gave_before(name: str) -> None:
    """torch's layers run other code there: their native inference path."""
    family = FAMILIES[name]
    outputs = []
    with torch.no_grad():
        for each in swapped(family):
            torch.manual_seed(3)
            outputs.append(each.eval()(family.input()))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@EVERY
def test_all_layers_of_the_known_families_run_their_fast_forms(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    report = accelerated(model)
    model(family.input())
    assert {row.note for row in report.swapped} <= {"", "its random_masking"}
    left = {row.kind.rsplit(".", 1)[1] for row in report.left}
    assert left <= {"Conv2d", "Linear", type(model).__name__}
    report.undo()


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


@EVERY
def test_bf16_autocast_is_at_most_twice_as_far_from_fp32_as_before(name: str) -> None:
    bf16_errors(FAMILIES[name], "cpu")


@pytest.mark.gpu
@EVERY
def test_bf16_autocast_on_a_device_is_at_most_twice_as_far_from_fp32_as_before(name: str) -> None:
    bf16_errors(FAMILIES[name], "cuda")


@pytest.mark.gpu
def test_a_vit_of_working_size_on_a_device_is_at_most_twice_as_far_from_fp32_as_before() -> None:
    bf16_errors(Family(lambda: VisionTransformer(384, 6, 2, 256), (16, 3, 64, 64)), "cuda")


@EVERY
def test_a_swapped_model_runs_the_kernels(name: str) -> None:
    """Backend "triton" refuses to run an op without its kernel."""
    family = FAMILIES[name]
    model, original = swapped(family)
    x = family.input()[:1]
    with dispatch.backend("triton"), attention.backend("eager"), launches() as names:
        output, gradients = run(model, x)
    assert len(names) >= 2
    assert_same((output, gradients), run(original, x), 1e-4)


def test_an_optimiser_made_before_goes_on_and_takes_the_same_steps() -> None:
    family = FAMILIES["timm's ViT"]
    models = [family.model(), family.model()]
    # Rounding of the key biases' gradients, which are zero, must not become whole steps: hence eps.
    optimisers = [torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4) for model in models]
    accelerated(models[0])
    losses: list[list[float]] = [[], []]
    for _ in range(4):
        for model, optimiser, curve in zip(models, optimisers, losses, strict=True):
            loss = model(family.input()).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            curve.append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (key, mine), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert without_keys(key, mine - expected).abs().max() <= 1e-5, key


def block_with_a_path() -> nn.Module:
    block = VisionTransformer().blocks[0]
    block.ls1, block.drop_path1, block.drop_path2 = LayerScale(WIDTH), DropPath(0.5), DropPath(0.25)
    return block


DROPPING = {
    "post-norm": lambda: encoder_layer(dropout=0.25),
    "pre-norm": lambda: encoder_layer(dropout=0.25, activation="gelu", norm_first=True),
    "timm's block": lambda: VisionTransformer(drop=0.25).blocks[0],
    "stochastic depth": block_with_a_path,
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_has_the_mean_and_spread_it_had_before_and_none_in_evaluation(name: str) -> None:
    """The same sequence many times in a batch."""
    layer, copies = DROPPING[name](), 4000
    original = copy.deepcopy(layer)
    report = accelerated(layer)
    x = torch.randn(1, 5, WIDTH).expand(copies, -1, -1)
    with torch.no_grad():
        mine, expected = layer(x), original(x)
        assert not report.rows[0].note
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
        accelerated(model)
    (kept, mask, restore), after = results[1]
    (expected, expected_mask, _), expected_after = results[0]
    assert torch.equal(mask, expected_mask)
    assert torch.equal(after, expected_after), "another number of random values was drawn"
    assert kept.shape == expected.shape
    padded = torch.cat([kept, torch.zeros(6, 16 - kept.shape[1], WIDTH)], 1)
    back = padded.gather(1, restore[..., None].expand(-1, -1, WIDTH))
    assert torch.equal(back, x * (1 - mask[..., None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_casting_norm_gives_the_type_of_its_input(dtype: torch.dtype) -> None:
    norm, x = CastingNorm(WIDTH), torch.randn(2, 5, WIDTH, dtype=dtype)
    report = accelerated(norm)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == dtype
    assert not report.rows[0].note


def test_no_swapped_layer_returns_a_view() -> None:
    """Which FSDP2 warns about, since a view must not be changed in place."""
    x = torch.randn(2, 9, WIDTH)
    for layer in (VisionTransformer().blocks[0], encoder_layer(), encoder_layer(norm_first=True)):
        accelerated(layer)
        for part in (
            layer,
            *(each for each in (getattr(layer, "attn", None), getattr(layer, "mlp", None)) if each),
        ):
            assert not part(x)._is_view()
    attention_layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    accelerated(attention_layer)
    assert not attention_layer(x, x, x, need_weights=False)[0]._is_view()
