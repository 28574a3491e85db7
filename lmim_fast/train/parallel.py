"""Everything that is done to a model before it is trained, in order; the model knows nothing of it.

Its device, bf16 for frozen matrices, activation checkpointing, compilation, and how several processes share
it: `replicate` keeps it whole in each of them, `shard` and `hybrid` split it with FSDP2.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lmim_fast.config import RunConfig
from lmim_fast.errors import UsageError
from lmim_fast.layers.block import PackedBlock
from lmim_fast.layers.decoder_layer import PackedDecoderLayer
from lmim_fast.train.gradients import FlatGradients, LocalGradients, ShardedGradients
from lmim_fast.train.task import Task
from lmim_fast.train.world import World

Mode = Literal["replicate", "shard", "hybrid"]

# Weights, gradients, their flat buffer and two moments, in fp32; an average of the weights is one more.
_BYTES_PER_PARAMETER = 4 * 5


class Gradients(Protocol):
    """How the gradients of a process become those of the whole batch."""

    def collect(self, last: bool) -> None:
        """Before a backward pass: whether it is the last one of its step."""

    def average_(self, losses: Tensor) -> None:
        """After it: gradients and `losses` (k,) become their means over the ranks, in place."""


def resolve(config: RunConfig, world: World) -> RunConfig:
    """The config with "auto" precision settled, checked against the number of processes.

    Raises:
        UsageError: the batch cannot be shared.
    """
    if config.batch_size % (world.size * config.accumulation):
        raise UsageError(
            f"--batch-size {config.batch_size} must be a multiple of {world.size} processes "
            f"x {config.accumulation} accumulation passes"
        )
    if config.precision != "auto":
        return config
    return dataclasses.replace(config, precision="bf16" if world.device.type == "cuda" else "fp32")


def settle(config: RunConfig, model: nn.Module, world: World) -> RunConfig:
    """The config with `parallel` and `cuda_graph` decided for this model on these processes.

    Raises:
        UsageError: options that do not go together; the message says which one to drop.
    """
    mode = _mode(config, model, world)
    refusal = _no_graph(config, mode, world)
    if config.cuda_graph == "on" and refusal:
        raise UsageError(f"--cuda-graph on {refusal}, or pass --cuda-graph auto")
    graph: Literal["on", "off"] = "off" if config.cuda_graph == "off" or refusal else "on"
    return dataclasses.replace(config, parallel=mode, cuda_graph=graph)


def _mode(config: RunConfig, model: nn.Module, world: World) -> Mode:
    mode = config.parallel
    if mode == "auto":
        mode = "shard" if world.size > 1 and not _fits(config, model, world) else "replicate"
    if config.shard_size and mode != "hybrid":
        raise UsageError(f"--shard-size {config.shard_size} is for --parallel hybrid: drop it")
    if config.reshard and mode == "replicate":
        raise UsageError("--reshard is for --parallel shard or hybrid: drop it")
    if mode != "replicate" and world.control is None:
        raise UsageError(
            f"--parallel {mode} needs torchrun, for one process too: drop it, or start with that"
        )
    if mode == "hybrid":
        size = config.shard_size or world.local_size
        if world.size % size or size in (1, world.size):
            raise UsageError(
                f"--parallel hybrid splits the model over groups of {size} of {world.size} processes: pass a "
                "--shard-size between them that divides their number, or --parallel shard or replicate"
            )
    return mode


def _fits(config: RunConfig, model: nn.Module, world: World) -> bool:
    """Whether the model and its optimiser take at most half of a GPU; on a CPU, always."""
    if world.device.type != "cuda":
        return True
    size = _BYTES_PER_PARAMETER + (4 if config.optim.ema_decay else 0)
    needed = size * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return needed <= torch.cuda.get_device_properties(world.device).total_memory / 2


def _no_graph(config: RunConfig, mode: Mode, world: World) -> str | None:
    """Why the step cannot be a CUDA graph, and what to drop for it; None where it can."""
    if world.device.type != "cuda":
        return f"is for CUDA, not for {world.device.type}: drop it"
    if config.accumulation > 1:
        return f"is for one pass a step: drop --accumulation {config.accumulation}"
    if mode != "replicate":
        return f"is for --parallel replicate: drop --parallel {mode}"
    if config.activation_checkpointing:
        return "saves no random state: drop --activation-checkpointing"
    return None


def apply(model: nn.Module, config: RunConfig, world: World) -> None:
    """Do all of it to the model, in place, for a config that is settled. Before the optimiser is made."""
    place(model, config, world)
    if config.activation_checkpointing:
        for block in _blocks(model):
            if next(block.parameters()).requires_grad:
                # An attribute: names in the state dict stay, and FSDP's hooks act around it.
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if config.compile:
        _compile(model, config)
    if config.parallel in ("shard", "hybrid"):
        _shard(model, config, world)


def place(model: nn.Module, config: RunConfig, world: World) -> None:
    """Move the model to the rank's device, in place; in a bf16 run frozen matrices become bf16."""
    model.to(world.device)
    if config.precision == "bf16":
        frozen_to_bf16(model)


def frozen_to_bf16(model: nn.Module) -> None:
    """Keep frozen matrices (a teacher's) in bf16, as autocast makes them in every step: no number changes.

    For models that run under bf16 autocast; their state dict then holds bf16 too.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.bfloat16()


def copied_weights(model: nn.Module, config: RunConfig) -> list[nn.Parameter]:
    """The trained matrices that a bf16 run keeps copies of, instead of casting them in every pass.

    None where FSDP gathers them in bf16, or a compiler fuses the casts.
    """
    if config.precision != "bf16" or config.compile or isinstance(model, FSDPModule):
        return []
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.float32]
    return [p for p in trained if p.dim() == 2 and p.is_contiguous()]


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, PackedBlock | PackedDecoderLayer))


def _compile(model: nn.Module, config: RunConfig) -> None:
    """torch.compile for the whole model, or for each block where FSDP or checkpointing acts between them."""
    if config.parallel not in ("shard", "hybrid") and not config.activation_checkpointing:
        model.compile(dynamic=False)
        return
    blocks = list(_blocks(model))
    # Blocks share their code, and each one that differs in a constant (drop path) is a graph of its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)


def _shard(model: nn.Module, config: RunConfig, world: World) -> None:
    """Split the trained weights with FSDP2: a unit for each encoder block, one for all the rest.

    The rest holds the decoder, whose layers are read before they are called: for all keys of the memory at
    once. Frozen weights stay whole. In a bf16 run weights are gathered in bf16, master weights and sums are
    fp32.
    """
    kind = world.device.type
    if config.parallel == "hybrid":
        size = config.shard_size or world.local_size
        shape = world.size // size, size
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the residual stream keeps its dtype
    )
    for block in list(model.modules()):
        if isinstance(block, PackedBlock) and next(block.parameters()).requires_grad:
            block.forward = functools.partial(_own_bias, block.forward)  # type: ignore[method-assign]
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard)
    model.forward = functools.partial(_own_output, model.forward)
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=frozen)
    # Said of outputs that are views and might be changed in place: losses never are.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _own_bias(forward: Callable[..., Any], *inputs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """A block's pass that returns a copy of its bias.

    The next block reads it, perhaps after this one's weights are freed. And FSDP puts a hook on every output
    in every step: a parameter would keep them all.
    """
    residual, branch, bias = forward(*inputs)
    return residual, branch, None if bias is None else bias.clone()


def _own_output(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """A model's pass whose output, a dataclass, holds copies of parameters, for the same reason."""
    output = forward(*inputs, **named)
    values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    parameters = {name: value for name, value in values.items() if isinstance(value, nn.Parameter)}
    return dataclasses.replace(output, **{name: value.clone() for name, value in parameters.items()})


def gradients(model: nn.Module, world: World) -> Gradients:
    """How a model that `apply` was called on averages its gradients."""
    if isinstance(model, FSDPModule):
        return ShardedGradients(model, world)
    return LocalGradients() if world.size == 1 else FlatGradients(model, world)


def whole(model: nn.Module, task: Task, world: World) -> nn.Module:
    """The model itself, or of a split one a copy with all of its weights; every rank calls it.

    To read, measure or store it as in one process.
    """
    if not isinstance(model, FSDPModule):
        return model
    state = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    copy = task.build()
    copy.load_state_dict(state)
    place(copy, task.config, world)
    return copy.train(model.training)
