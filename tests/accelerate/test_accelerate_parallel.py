"""accelerate(model) before DistributedDataParallel and fully_shard, in a group of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate_models import FAMILIES
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lmim_fast import accelerate


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[distributed.DeviceMesh]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield distributed.init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model(FAMILIES["timm's ViT"].input()).square().sum().backward()
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


# A linear returns a view if its input has three dimensions.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda model, mesh: DistributedDataParallel(model), ""),
        (shard_blocks, ""),
        (shard_parts_of_blocks, "runs its own forward: hooks on its Attention"),
    ],
)
def test_a_swapped_model_trains_the_same_when_it_is_wrapped(
    mesh: distributed.DeviceMesh, wrap: Callable[..., nn.Module], note: str
) -> None:
    model = FAMILIES["timm's ViT"].model()
    expected = gradients(copy.deepcopy(model))
    report = accelerate(model)
    found = gradients(wrap(model, mesh))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)
    assert {row.note for row in report.swapped if row.name.startswith("blocks.") and row.kind == "Block"} == {
        note
    }


def test_layers_that_are_sharded_already_are_left_alone(mesh: distributed.DeviceMesh) -> None:
    model = FAMILIES["timm's ViT"].model()
    fully_shard(model.blocks[0], mesh=mesh)
    report = accelerate(model)
    assert [row.reason for row in report.left if row.name == "blocks.0"] == [
        "wrapped for several devices; accelerate it before"
    ]
    assert "blocks.1" in [row.name for row in report.swapped]
