"""accelerate(model): names, weights, copies and the way back; with torch.compile and around other modes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from accelerate_models import (
    FAMILIES,
    HEADS,
    WIDTH,
    Family,
    MaskedAutoencoder,
    VisionTransformer,
    assert_same,
    run,
    swapped,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lmim_fast import accelerate
from lmim_fast.layers.accelerated.base import Accelerated


@pytest.mark.parametrize("name", FAMILIES)
def test_names_parameters_and_state_dict_stay(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    before = dict(model.named_parameters()), list(model.state_dict()), dict(model.named_modules())
    accelerate(model)
    assert list(model.state_dict()) == before[1]
    assert all(parameter is before[0][key] for key, parameter in model.named_parameters())
    assert all(module is before[2][key] for key, module in model.named_modules())
    other = family.make()
    model.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(model.state_dict(), strict=True)
    x = family.input()
    assert_same(run(model, x), run(other, x), 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_undo_gives_back_every_class_attribute_and_bit(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    expected = run(model, family.input())
    report = accelerate(model)
    assert any(isinstance(module, Accelerated) for module in model.modules())
    report.undo()
    report.undo()
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == before
    output, gradients = run(model, family.input())
    assert torch.equal(output, expected[0])
    assert all(torch.equal(gradients[key], value) for key, value in expected[1].items())


def test_the_end_of_a_with_block_undoes_the_swap_after_an_error_too() -> None:
    layer = nn.LayerNorm(4)
    with accelerate(layer) as report:
        assert len(report.swapped) == 1
        assert type(layer) is not nn.LayerNorm
    assert type(layer) is nn.LayerNorm
    with pytest.raises(RuntimeError, match="normalized_shape"), accelerate(layer):
        layer(torch.zeros(2, 5))
    assert type(layer) is nn.LayerNorm


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_and_an_unpickled_model_have_their_fast_forms_and_the_same_results(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    report = accelerate(model)
    expected = run(model, family.input())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        output, gradients = run(other, family.input())
        assert torch.equal(output, expected[0])
        assert all(torch.equal(gradients[key], value) for key, value in expected[1].items())
    copied = copy.deepcopy(model)
    report.undo()
    assert any(isinstance(module, Accelerated) for module in copied.modules())


def test_weights_saved_by_a_swapped_model_load_into_a_plain_one(tmp_path: Path) -> None:
    family = FAMILIES["timm's ViT"]
    model, plain = swapped(family)[0], family.make()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    plain.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_same(run(plain, family.input()), run(model, family.input()), 1e-5)


@pytest.mark.parametrize("name", ["torch Transformer", "timm's ViT", "public MAE"])
def test_a_swapped_model_compiles_without_graph_breaks(name: str) -> None:
    family = FAMILIES[name]
    model, original = swapped(family)
    x = family.input()
    calls = []

    def record(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.manual_seed(3)
    compiled = torch.compile(model, fullgraph=True, backend=record)(x)
    assert any("scaled_dot_product_attention" in call for call in calls), (
        "the fast forms are not in the graph"
    )
    assert not any("softmax" in call or "multi_head_attention_forward" in call for call in calls)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled, original(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_the_mode_that_accelerate_is_called_in_does_not_matter(
    mode: Callable[[], AbstractContextManager[None]],
) -> None:
    rows = [(row.name, row.swapped, row.reason) for row in accelerate(MaskedAutoencoder()).rows]
    model = MaskedAutoencoder()
    with mode():
        found = accelerate(model).rows
    assert [(row.name, row.swapped, row.reason) for row in found] == rows
    model(torch.randn(2, 3, 16, 16)).backward()
    assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()


def test_a_default_device_does_not_matter() -> None:
    model = MaskedAutoencoder()
    with torch.device("meta"):
        report = accelerate(model)
    assert {"", "blocks.0", "blocks.0.norm1"} <= {row.name for row in report.swapped}


def test_checkpointed_layers_draw_the_same_dropout_again() -> None:
    block = VisionTransformer(drop=0.25).blocks[0]
    accelerate(block)
    gradients = []
    for checkpointed in (True, False):
        x = torch.ones(2, 5, WIDTH, requires_grad=True)
        torch.manual_seed(0)
        output = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        gradients.append(torch.autograd.grad(output.square().sum(), [x, *block.parameters()]))
    for again, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept)


def test_layers_of_timm_itself_are_swapped_and_give_the_same_results() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    family = Family(
        lambda: timm.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=5
        ),
        (2, 3, 32, 32),
    )
    model, original = swapped(family)
    assert_same(run(model, family.input()), run(original, family.input()), 1e-5)
    names = {row.name for row in accelerate(family.model()).swapped}
    assert {"blocks.0", "blocks.1.attn", "blocks.1.mlp", "norm"} <= names
