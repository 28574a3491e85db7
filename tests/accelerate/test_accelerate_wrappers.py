"""accelerate(model): names, copies and the way back; under compilers, transforms and data parallelism."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate_models import FAMILIES, VIT, WIDTH, MaskedAutoencoder, X, block
from before_and_after import Swapped, accelerated, bound, errors, run
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lmim_fast.layers.accelerate import undo

TORCH = FAMILIES["torch"]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return max(errors(found, expected).values()) <= 1e-5


def test_class_names_parameters_and_state_dict_stay() -> None:
    model = VIT.model()

    def seen() -> list[object]:
        named = [*model.named_parameters(), *model.named_modules()]
        types = [type(module) for module in model.modules()]
        return [*((name, id(each)) for name, each in named), *types, *model.state_dict()]

    before = seen()
    accelerated(model)
    assert bound(model)
    assert seen() == before


@pytest.mark.parametrize("name", ["torch", "public MAE"])
def test_undo_gives_back_every_attribute_and_bit(name: str) -> None:
    swapped = Swapped(FAMILIES[name].model())
    assert bound(swapped.layer)
    swapped.report.undo()
    swapped.report.undo()
    attributes = [[sorted(vars(each)) for each in m.modules()] for m in (swapped.layer, swapped.original)]
    assert attributes[0] == attributes[1]
    swapped.check(*FAMILIES[name].inputs(), tolerance=0.0)


def test_the_end_of_a_with_block_undoes_the_swap_after_an_error_too() -> None:
    layer = nn.LayerNorm(4)
    with accelerated(layer):
        assert bound(layer) == [""]
    assert not bound(layer)
    with pytest.raises(RuntimeError, match="normalized_shape"), accelerated(layer):
        layer(torch.zeros(2, 5))
    assert not bound(layer)


def test_a_deep_copy_is_fast_and_independent() -> None:
    swapped = Swapped(VIT.model())
    copied = copy.deepcopy(swapped.layer)
    assert bound(copied) == bound(swapped.layer)
    assert all(module.forward.__self__ is module for module in copied.modules())
    swapped.report.undo()
    for parameter in swapped.layer.parameters():
        parameter.data.zero_()
    assert same(run(copied, *VIT.inputs()), run(swapped.original, *VIT.inputs()))
    undo(copied)
    assert not bound(copied)


def test_a_pickle_is_that_of_the_plain_model_and_can_be_swapped_again() -> None:
    swapped = Swapped(TORCH.model())
    written = pickle.dumps(swapped.layer)
    assert b"lmim_fast" not in written
    loaded, expected = pickle.loads(written), run(swapped.original, *TORCH.inputs())
    assert same(run(loaded, *TORCH.inputs()), expected)
    report = accelerated(loaded)
    assert bound(loaded) == bound(swapped.layer)
    assert same(run(loaded, *TORCH.inputs()), expected)
    report.undo()
    assert not bound(loaded)


def test_a_replica_of_data_parallel_runs_the_original_on_its_own_weights() -> None:
    layer = Swapped(nn.LayerNorm(4)).layer
    assert not bound(layer._replicate_for_data_parallel())
    assert bound(layer)


@pytest.mark.parametrize("name", ["torch", pytest.param("scaled ViT", marks=pytest.mark.slow), "public MAE"])
def test_a_swapped_model_compiles_without_graph_breaks(name: str) -> None:
    swapped, inputs, calls = Swapped(FAMILIES[name].model()), FAMILIES[name].inputs(), []

    def record(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.manual_seed(3)
    compiled = torch.compile(swapped.layer, fullgraph=True, backend=record)(*inputs)
    assert any("scaled_dot_product_attention" in call for call in calls), "no fast form is in the graph"
    assert not any("softmax" in call or "multi_head_attention_forward" in call for call in calls)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled, swapped.original(*inputs), rtol=1e-5, atol=1e-5)


def test_calls_that_are_left_and_changes_later_compile_too() -> None:
    swapped = Swapped(block())
    torch._dynamo.reset()
    compiled = torch.compile(swapped.layer, fullgraph=True, backend="eager")

    def change(layer: nn.Module) -> None:
        layer.attn.scale, layer.mlp.act = 1.0, nn.ReLU()
        torch.manual_seed(0)
        layer.attn.qkv = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.Tanh())

    for _ in range(2):
        for options in ({}, {"attn_mask": torch.zeros(9, 9)}):
            expected = swapped.original(X, **options)
            torch.testing.assert_close(compiled(X, **options), expected, rtol=1e-5, atol=1e-5)
        swapped.both(change)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_layer_is_the_original_and_has_its_arguments(strict: bool) -> None:
    swapped = Swapped(block().eval())
    sizes = {"x": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(swapped.layer, (X,), strict=strict, dynamic_shapes=sizes)
    assert any("softmax" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(X), swapped.original(X), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace(_method)?` is deprecated:DeprecationWarning")
def test_tracing_takes_the_original_forward() -> None:
    swapped = Swapped(block())
    traced = torch.jit.trace(swapped.layer, X, check_trace=False)
    torch.testing.assert_close(traced(X), swapped.original(X))
    assert swapped.note.endswith("torch.jit is tracing")


def test_a_graph_of_torch_fx_holds_the_original() -> None:
    mlp = Swapped(block().mlp).layer
    nodes = [str(node.target) for node in torch.fx.symbolic_trace(mlp).graph.nodes]
    assert nodes == ["x", "fc1", "act", "drop1", "norm", "fc2", "drop2", "output"]


@pytest.mark.parametrize("compiled", [False, True])
def test_transforms_of_torch_func_take_the_original_forward(compiled: bool) -> None:
    swapped = Swapped(block())
    torch._dynamo.reset()

    def gradient(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return torch.func.vmap(torch.func.grad(lambda row: layer(row[None]).sum()))

    found = gradient(swapped.layer)
    found = torch.compile(found, backend="aot_eager") if compiled else found
    torch.testing.assert_close(found(X), gradient(swapped.original)(X))
    tangents = [torch.func.jvp(each, (X,), (X,))[1] for each in (swapped.layer, swapped.original)]
    torch.testing.assert_close(*tangents)


def test_weights_given_from_outside_are_used_one_set_or_many_at_a_time() -> None:
    layer, other = Swapped(block()).layer, block()
    weights, expected = dict(other.named_parameters()), other(X)
    found = torch.func.functional_call(layer, weights, (X,))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    stacked = {key: torch.stack([value.detach()] * 2) for key, value in weights.items()}
    both = torch.func.vmap(lambda each: torch.func.functional_call(layer, each, (X,)))(stacked)
    torch.testing.assert_close(both[1], expected, rtol=1e-5, atol=1e-5)


def test_the_mode_that_accelerate_is_called_in_does_not_matter() -> None:
    model = MaskedAutoencoder()
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        report = accelerated(model)
    assert {"", "blocks.0", "blocks.0.norm1"} <= {row.name for row in report.swapped}
    model(torch.randn(2, 3, 16, 16)).backward()
    assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()


def test_checkpointed_layers_draw_the_same_dropout_again() -> None:
    layer = Swapped(block(proj_drop=0.25, attn_drop=0.25)).layer
    expected, forward = run(layer, X), layer.forward
    layer.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    assert same(run(layer, X), expected)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[distributed.DeviceMesh]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield distributed.init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    model(*VIT.inputs()).square().sum().backward()
    found = {name.removeprefix("module."): each.grad for name, each in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def shard_blocks(model: nn.Module, mesh: distributed.DeviceMesh) -> nn.Module:
    for each in model.blocks:
        fully_shard(each, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_attentions(model: nn.Module, mesh: distributed.DeviceMesh) -> nn.Module:
    for each in model.blocks:
        fully_shard(each.attn, mesh=mesh)
    return model


WRAPPERS = {
    "DistributedDataParallel": (lambda model, mesh: DistributedDataParallel(model), ""),
    "FSDP2 of blocks": (shard_blocks, ""),
    "FSDP2 of their attentions": (shard_attentions, "FSDPAttention"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_swapped_model_trains_the_same_when_it_is_wrapped(name: str, mesh: distributed.DeviceMesh) -> None:
    """And no warning of a result that is a view."""
    wrap, note = WRAPPERS[name]
    swapped = Swapped(VIT.model())
    assert same(gradients_of(wrap(swapped.layer, mesh)), gradients_of(swapped.original))
    notes = {row.note.rsplit(".", 1)[-1] for row in swapped.report.swapped if row.kind == "timm_like.Block"}
    assert notes == {note}


def test_layers_that_are_sharded_already_are_left_alone(mesh: distributed.DeviceMesh) -> None:
    model = VIT.model()
    fully_shard(model.blocks[0], mesh=mesh)
    report = accelerated(model)
    (reason,) = [row.reason for row in report.left if row.name == "blocks.0"]
    assert "wrapped for several devices" in reason
    assert "blocks.1" in [row.name for row in report.swapped]
