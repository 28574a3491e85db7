"""What other people's wrappers do to an accelerated model: does it run fast, fall back, or refuse?

Each wrapper takes a model in training mode and returns what is called instead. It is put around the model
as it is and around the accelerated one (or the wrapped model is accelerated), and both are compared.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from benchmarks.accelerated.models import Subject

Wrapper = Callable[[Subject], nn.Module]
FIRST = "accelerate, wrap"
LAST = "wrap, accelerate"
WRAPPERS: dict[str, Wrapper] = {}
ORDERS: dict[str, tuple[str, ...]] = {}


def wrapper(name: str, *orders: str) -> Callable[[Wrapper], Wrapper]:
    """List a wrapper under a name, tried in these orders; none: in both."""

    def register(wrap: Wrapper) -> Wrapper:
        WRAPPERS[name], ORDERS[name] = wrap, orders or (FIRST, LAST)
        return wrap

    return register


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The stack of blocks."""
    stack: Any = model.blocks if hasattr(model, "blocks") else model.layers
    return nn.ModuleList(stack)


def linears_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, name) of every nn.Linear in the stack that is called; PyTorch does not call out_proj."""
    names = ("qkv", "proj", "fc1", "fc2", "linear1", "linear2")
    return [
        (parent, name)
        for parent in layers_of(model).modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and name in names
    ]


@wrapper("none", FIRST)
def _none(each: Subject) -> nn.Module:
    return each.model


@wrapper("DistributedDataParallel", FIRST)
def _ddp(each: Subject) -> nn.Module:
    return nn.parallel.DistributedDataParallel(each.model)


@wrapper("FSDP2, blocks")
def _fsdp(each: Subject) -> nn.Module:
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in layers_of(each.model):
        fully_shard(layer, mesh=mesh)
    fully_shard(each.model, mesh=mesh)
    return each.model


@wrapper("FSDP2, attention")
def _fsdp_parts(each: Subject) -> nn.Module:
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in layers_of(each.model):
        attention: Any = layer.attn if hasattr(layer, "attn") else layer.self_attn
        fully_shard(attention, mesh=mesh)
    return each.model


@wrapper("nn.DataParallel replica", FIRST)
def _replica(each: Subject) -> nn.Module:
    """As nn.parallel.replicate makes one, with other weights than the model's."""
    modules = list(each.model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            if child is not None:
                replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(replica, name, 1.5 * parameter)
    model = replicas[each.model]
    model.named_parameters = each.model.named_parameters  # the gradients of these
    return model


@wrapper("EMA by deepcopy", FIRST)
def _ema(each: Subject) -> nn.Module:
    averaged = torch.optim.swa_utils.AveragedModel(each.model, multi_avg_fn=_halfway)
    averaged.update_parameters(each.model)
    with torch.no_grad():
        for parameter in each.model.parameters():
            parameter.mul_(2)
    averaged.update_parameters(each.model)
    return averaged.module.requires_grad_()


def _halfway(averages: Iterable[Tensor], weights: Iterable[Tensor], _: Any) -> None:
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight, 0.5)


@wrapper("deepcopy, other weights", FIRST)
def _copied(each: Subject) -> nn.Module:
    copied = copy.deepcopy(each.model)
    with torch.no_grad():
        for parameter in each.model.parameters():
            parameter.zero_()
    return copied


@wrapper("pickle", FIRST)
def _pickled(each: Subject) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(each.model))
    with torch.no_grad():
        for parameter in each.model.parameters():
            parameter.zero_()
    return loaded


@wrapper("torch.save of the model", FIRST)
def _saved(each: Subject) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(each.model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@wrapper("peft LoRA")
def _peft(each: Subject) -> nn.Module:
    peft = importlib.import_module("peft")
    names = sorted({name for _, name in linears_of(each.model)})
    adapted = peft.get_peft_model(each.model, peft.LoraConfig(r=4, target_modules=names))
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return adapted


@wrapper("peft LoRA, merged again", FIRST)
def _merged(each: Subject) -> nn.Module:
    merged: nn.Module = _peft(each).merge_and_unload()  # type: ignore[operator]
    return merged.requires_grad_()


@wrapper("loralib")
def _loralib(each: Subject) -> nn.Module:
    loralib = importlib.import_module("loralib")
    for parent, name in linears_of(each.model):
        old = getattr(parent, name)
        new = loralib.Linear(old.in_features, old.out_features, r=4, merge_weights=False)
        new.weight, new.bias = old.weight, old.bias
        new.lora_B.data.normal_(std=0.1)
        setattr(parent, name, new)
    return each.model


class Adapter(nn.Module):
    """A linear beside a bottleneck."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, 4), nn.Linear(4, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., F)."""
        out: Tensor = self.linear(x) + self.up(self.down(x))
        return out


@wrapper("an own adapter without a weight")
def _adapter(each: Subject) -> nn.Module:
    for parent, name in linears_of(each.model):
        setattr(parent, name, Adapter(getattr(parent, name)))
    return each.model


@wrapper("forward hooks on linears")
def _hooks(each: Subject) -> nn.Module:
    for parent, name in linears_of(each.model):
        getattr(parent, name).register_forward_hook(lambda module, inputs, out: 1.5 * out)
    return each.model


@wrapper("forward hooks, removed", FIRST)
def _removed_hooks(each: Subject) -> nn.Module:
    handles = [
        getattr(parent, name).register_forward_hook(lambda module, inputs, out: 1.5 * out)
        for parent, name in linears_of(each.model)
    ]
    each()
    for handle in handles:
        handle.remove()
    return each.model


@wrapper("full backward hooks on linears")
def _backward_hooks(each: Subject) -> nn.Module:
    for parent, name in linears_of(each.model):
        getattr(parent, name).register_full_backward_hook(lambda module, inputs, outputs: (1.5 * inputs[0],))
    return each.model


@wrapper("pruning")
def _prune(each: Subject) -> nn.Module:
    for parent, name in linears_of(each.model):
        prune.l1_unstructured(getattr(parent, name), "weight", amount=0.5)
    return each.model


@wrapper("pruning, made permanent", FIRST)
def _pruned(each: Subject) -> nn.Module:
    for parent, name in linears_of(_prune(each)):
        prune.remove(getattr(parent, name), "weight")
    return each.model


@wrapper("weight norm, hooks")
def _weight_norm(each: Subject) -> nn.Module:
    for parent, name in linears_of(each.model):
        nn.utils.weight_norm(getattr(parent, name))
    return each.model


@wrapper("weight norm, parametrization")
def _parametrized(each: Subject) -> nn.Module:
    for parent, name in linears_of(each.model):
        parametrizations.weight_norm(getattr(parent, name))
    return each.model


@wrapper("spectral norm")
def _spectral(each: Subject) -> nn.Module:
    for parent, name in linears_of(each.model):
        parametrizations.spectral_norm(getattr(parent, name))
    return each.model


@wrapper("gradient checkpointing")
def _checkpointed(each: Subject) -> nn.Module:
    for layer in layers_of(each.model):
        forward = layer.forward
        layer.forward = lambda *arguments, _forward=forward, **named: checkpoint(
            _forward, *arguments, use_reentrant=False, **named
        )
    return each.model


@wrapper("dynamic int8, torch.ao")
def _quantized(each: Subject) -> nn.Module:
    quantized: nn.Module = torch.ao.quantization.quantize_dynamic(each.model.eval(), {nn.Linear})
    return quantized


@wrapper("dynamic int8, torchao")
def _torchao(each: Subject) -> nn.Module:
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(each.model.eval(), quantization.Int8DynamicActivationInt8WeightConfig())
    return each.model
