"""accelerate(model): the swapped model computes what it did before, at its precision, on kernels too."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from accelerate_models import FAMILIES, HEADS, WIDTH, Family, VisionTransformer, X, block, encoder_layer
from before_and_after import Swapped, errors, run
from foreign_layers import MlpBlock
from timm_like import Attention, DropPath
from torch import nn

from benchmarks.operation import launches
from lmim_fast.ops import attention, dispatch

EVERY = pytest.mark.parametrize("name", FAMILIES)


@EVERY
def test_outputs_and_every_gradient_are_those_of_the_model_before(name: str) -> None:
    """From fast forms alone, whose calls leave no note."""
    swapped, inputs = Swapped(FAMILIES[name].model()), FAMILIES[name].inputs()
    swapped.both(nn.Module.double).check(*(x.double() for x in inputs), tolerance=1e-10)
    assert not swapped.notes
    left = {row.kind.rsplit(".", 1)[1] for row in swapped.report.left}
    assert left <= {"Conv2d", "Linear", type(swapped.layer).__name__}
    with torch.no_grad():
        swapped.both(lambda model: model.float().eval()).check(*inputs)


def bf16_errors(family: Family, device: str) -> None:
    """Median over several inputs: a ReLU that flips, on one kind of CPU only, doubles a single error.

    Never asked to be below one rounding.
    """
    swapped = Swapped(family.model().to(device))
    found: list[dict[str, list[float]]] = [{}, {}]
    for seed in range(7):
        inputs = [x.to(device) for x in family.inputs(seed)]
        exact = run(swapped.original, *inputs)
        for model, of_model in zip((swapped.layer, swapped.original), found, strict=True):
            with torch.autocast(device, torch.bfloat16):
                values = run(model, *inputs)
            for key, error in errors(values, exact).items():
                of_model.setdefault(key, []).append(error)
    for key, mine in found[0].items():
        assert median(mine) <= 2 * max(median(found[1][key]), torch.finfo(torch.bfloat16).eps / 2), key


@EVERY
def test_bf16_autocast_is_at_most_twice_as_far_from_fp32_as_before(name: str) -> None:
    bf16_errors(FAMILIES[name], "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FAMILIES, "of working size"])
def test_bf16_autocast_on_a_device_is_at_most_twice_as_far_from_fp32_as_before(name: str) -> None:
    large = Family(lambda: VisionTransformer(384, 6, 256), (16, 3, 64, 64))
    bf16_errors(FAMILIES.get(name, large), "cuda")


@EVERY
def test_a_swapped_model_runs_the_kernels(name: str) -> None:
    """Backend "triton" refuses to run an op without its kernel."""
    swapped, inputs = Swapped(FAMILIES[name].model()), FAMILIES[name].inputs()
    inputs = [x[:, :1] if name == "torch, pre-norm" else x[:1] for x in inputs]
    with dispatch.backend("triton"), attention.backend("eager"), launches() as names:
        found = run(swapped.layer, *inputs)
    assert len(names) >= 2
    assert max(errors(found, run(swapped.original, *inputs)).values()) <= 1e-4


def dropping_block() -> nn.Module:
    layer = block(proj_drop=0.25, attn_drop=0.25)
    layer.drop_path1, layer.drop_path2 = DropPath(0.5), DropPath(0.125)
    return layer


DROPPING = {
    "post-norm": lambda: encoder_layer(dropout=0.25),
    "pre-norm": lambda: encoder_layer(dropout=0.25, activation="gelu", norm_first=True),
    "timm's block": lambda: block(proj_drop=0.25, attn_drop=0.25),
    "stochastic depth": dropping_block,
    "timm's attention": lambda: Attention(WIDTH, HEADS, proj_drop=0.25),
    "torchvision's MLP": lambda: MlpBlock(WIDTH, 48, 0.25),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_has_the_mean_and_spread_it_had_before_and_none_in_evaluation(name: str) -> None:
    """The same sequence many times in a batch."""
    swapped, copies = Swapped(DROPPING[name]()), 3000
    x = torch.randn(1, 3, WIDTH).expand(copies, -1, -1)
    with torch.no_grad():
        mine, expected = swapped.layer(x), swapped.original(x)
        error = (mine.mean(0) - expected.mean(0)).abs()
        assert (error <= 5 * ((mine.var(0) + expected.var(0)) / copies).sqrt() + 1e-6).all()
        spread = mine.std(0).square().mean().sqrt() / expected.std(0).square().mean().sqrt()
        assert 0.97 < spread < 1.03
        assert not swapped.notes
        swapped.both(nn.Module.eval).check(x[:2])


def test_no_swapped_layer_returns_a_view() -> None:
    """Which FSDP2 warns about, since a view must not be changed in place."""
    timm = Swapped(block()).layer
    encoders = [Swapped(encoder_layer(norm_first=first)).layer for first in (False, True)]
    for layer in (timm, timm.attn, timm.mlp, *encoders):
        assert not layer(X)._is_view()
    assert not Swapped(nn.MultiheadAttention(WIDTH, HEADS)).layer(X, X, X, need_weights=False)[0]._is_view()
