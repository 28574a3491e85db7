"""accelerate(model): names, copies and the way back; under compilers, transforms and data parallelism."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from accelerate_models import (
    FAMILIES,
    HEADS,
    WIDTH,
    MaskedAutoencoder,
    VisionTransformer,
    accelerated,
    assert_same,
    run,
    swapped,
)
from timm_like import Block
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lmim_fast.layers.accelerate import undo
from lmim_fast.layers.fast_forwards.form import is_bound

VIT = FAMILIES["timm's ViT"]
TORCH = FAMILIES["torch Transformer"]
X = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))


def bound(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_bound(module)]


def test_class_names_parameters_and_state_dict_stay(tmp_path: Path) -> None:
    model = VIT.model()
    before = dict(model.named_parameters()), list(model.state_dict()), dict(model.named_modules())
    types = [type(module) for module in model.modules()]
    accelerated(model)
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == before[1]
    assert all(parameter is before[0][key] for key, parameter in model.named_parameters())
    assert all(module is before[2][key] for key, module in model.named_modules())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = VIT.make()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    assert_same(run(model, VIT.input()), run(other, VIT.input()), 1e-5)


@pytest.mark.parametrize("name", ["torch Transformer", "public MAE"])
def test_undo_gives_back_every_attribute_and_bit(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    before = [sorted(vars(module)) for module in model.modules()]
    expected = run(model, family.input())
    report = accelerated(model)
    assert bound(model)
    report.undo()
    report.undo()
    assert [sorted(vars(module)) for module in model.modules()] == before
    output, gradients = run(model, family.input())
    assert torch.equal(output, expected[0])
    assert all(torch.equal(gradients[key], value) for key, value in expected[1].items())


def test_the_end_of_a_with_block_undoes_the_swap_after_an_error_too() -> None:
    layer = nn.LayerNorm(4)
    with accelerated(layer):
        assert is_bound(layer)
    assert not is_bound(layer)
    with pytest.raises(RuntimeError, match="normalized_shape"), accelerated(layer):
        layer(torch.zeros(2, 5))
    assert not is_bound(layer)


def test_a_deep_copy_is_fast_and_independent() -> None:
    model = VIT.model()
    report = accelerated(model)
    copied = copy.deepcopy(model)
    assert bound(copied) == bound(model)
    assert all(module.forward.__self__ is module for module in copied.modules())
    report.undo()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    expected = VIT.model()
    assert_same(run(copied, VIT.input()), run(expected, VIT.input()), 1e-5)
    assert bound(copied)
    undo(copied)
    assert not bound(copied)


def test_a_pickle_is_that_of_the_plain_model_and_can_be_swapped_again() -> None:
    model = TORCH.model()
    expected = run(model, TORCH.input())
    accelerated(model)
    written = pickle.dumps(model)
    assert b"lmim_fast" not in written
    loaded = pickle.loads(written)
    assert not bound(loaded)
    assert_same(run(loaded, TORCH.input()), expected, 1e-5)
    report = accelerated(loaded)
    assert not [row for row in report.rows if "patched" in row.reason]
    assert bound(loaded) == bound(model)
    assert_same(run(loaded, TORCH.input()), expected, 1e-5)
    report.undo()
    assert not [module for module in loaded.modules() if "forward" in vars(module)]


def test_a_replica_of_data_parallel_runs_the_original_on_its_own_weights() -> None:
    layer = Block(WIDTH, HEADS)
    accelerated(layer)
    replica = layer._replicate_for_data_parallel()
    assert not is_bound(replica)
    assert is_bound(layer)


@pytest.mark.parametrize(
    "name", ["torch Transformer", "timm's ViT", "ViT with LayerScale and q/k norms", "public MAE"]
)
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


def test_calls_that_are_left_and_changes_later_compile_too() -> None:
    layer, mask = Block(WIDTH, HEADS), torch.zeros(9, 9)
    original = copy.deepcopy(layer)
    accelerated(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for _ in range(2):
        for options in ({}, {"attn_mask": mask}):
            expected = original(X, **options)
            torch.testing.assert_close(compiled(X, **options), expected, rtol=1e-5, atol=1e-5)
        layer.attn.scale = original.attn.scale = 1.0
        layer.mlp.act = original.mlp.act = nn.ReLU()
        layer.attn.qkv = original.attn.qkv = nn.Sequential(original.attn.qkv, nn.Tanh())


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_layer_is_the_original_and_has_its_arguments(strict: bool) -> None:
    layer = Block(WIDTH, HEADS).eval()
    expected = layer(X)
    accelerated(layer)
    sizes = {"x": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(layer, (X,), strict=strict, dynamic_shapes=sizes)
    assert any("softmax" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace(_method)?` is deprecated:DeprecationWarning")
def test_tracing_takes_the_original_forward() -> None:
    block = Block(WIDTH, HEADS)
    expected = block(X)
    report = accelerated(block)
    torch.testing.assert_close(torch.jit.trace(block, X, check_trace=False)(X), expected)
    assert report.swapped[0].note.endswith("torch.jit is tracing")


def test_a_graph_of_torch_fx_holds_the_original() -> None:
    mlp = Block(WIDTH, HEADS).mlp
    accelerated(mlp)
    nodes = [str(node.target) for node in torch.fx.symbolic_trace(mlp).graph.nodes]
    assert nodes == ["x", "fc1", "act", "drop1", "norm", "fc2", "drop2", "output"]


@pytest.mark.parametrize("compiled", [False, True])
def test_transforms_of_torch_func_take_the_original_forward(compiled: bool) -> None:
    block = Block(WIDTH, HEADS)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: block(row[None]).sum()))(x)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(block, (x,), (torch.ones_like(x),))[1]

    expected = gradient(X), tangent(X)
    accelerated(block)
    torch._dynamo.reset()
    form = torch.compile(gradient, backend="aot_eager") if compiled else gradient
    torch.testing.assert_close((form(X), tangent(X)), expected)


def test_weights_given_from_outside_are_used_one_set_or_many_at_a_time() -> None:
    block, other = Block(WIDTH, HEADS), dict(Block(WIDTH, HEADS).named_parameters())
    accelerated(block)
    reference = Block(WIDTH, HEADS)
    reference.load_state_dict(other)
    found = torch.func.functional_call(block, other, (X,))
    torch.testing.assert_close(found, reference(X), rtol=1e-5, atol=1e-5)
    stacked = {key: torch.stack([value.detach(), value.detach()]) for key, value in other.items()}
    both = torch.func.vmap(lambda weights: torch.func.functional_call(block, weights, (X,)))(stacked)
    torch.testing.assert_close(both[1], reference(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_the_mode_that_accelerate_is_called_in_does_not_matter(
    mode: Callable[[], AbstractContextManager[None]],
) -> None:
    model = MaskedAutoencoder()
    with mode(), torch.device("meta"):
        report = accelerated(model)
    assert {"", "blocks.0", "blocks.0.norm1"} <= {row.name for row in report.swapped}
    model(torch.randn(2, 3, 16, 16)).backward()
    assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()


def test_checkpointed_layers_draw_the_same_dropout_again() -> None:
    block = VisionTransformer(drop=0.25).blocks[0]
    accelerated(block)
    gradients = []
    for checkpointed in (True, False):
        x = torch.ones(2, 5, WIDTH, requires_grad=True)
        torch.manual_seed(0)
        output = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        gradients.append(torch.autograd.grad(output.square().sum(), [x, *block.parameters()]))
    for again, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_dynamically_quantised_parts_are_called() -> None:
    layer = Block(WIDTH, HEADS).eval()
    report = accelerated(layer)
    plain = layer(X)
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch has no quantised linear")
    layer.mlp.fc1 = torch.ao.nn.quantized.dynamic.Linear.from_float(_with_config(layer.mlp.fc1))
    assert 0 < (layer(X) - plain).abs().max() < 0.1
    assert "mlp: fc1 is a torch.ao" in report.rows[0].note


def _with_config(linear: nn.Linear) -> nn.Linear:
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[distributed.DeviceMesh]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield distributed.init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    model(VIT.input()).square().sum().backward()
    full = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name.removeprefix("module."): grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in full.items()
    }


def shard_blocks(model: nn.Module, mesh: distributed.DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_parts_of_blocks(model: nn.Module, mesh: distributed.DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block.attn, mesh=mesh)
    return model


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda model, mesh: DistributedDataParallel(model), ""),
        (shard_blocks, ""),
        (shard_parts_of_blocks, "FSDPAttention"),
    ],
)
def test_a_swapped_model_trains_the_same_when_it_is_wrapped(
    mesh: distributed.DeviceMesh, wrap: Callable[..., nn.Module], note: str
) -> None:
    """And no warning of a result that is a view."""
    model = VIT.model()
    expected = gradients_of(copy.deepcopy(model))
    report = accelerated(model)
    found = gradients_of(wrap(model, mesh))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)
    notes = {row.note.rsplit(".", 1)[-1] for row in report.swapped if row.kind == "timm_like.Block"}
    assert notes == {note}


def test_layers_that_are_sharded_already_are_left_alone(mesh: distributed.DeviceMesh) -> None:
    model = VIT.model()
    fully_shard(model.blocks[0], mesh=mesh)
    report = accelerated(model)
    assert [row.reason for row in report.left if row.name == "blocks.0"] == [
        "wrapped for several devices; accelerate it before"
    ]
    assert "blocks.1" in [row.name for row in report.swapped]
