"""What is done to a model before it is trained, in order; the model knows nothing of it."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lmim_fast.config import RunConfig
from lmim_fast.train.world import World


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


def wrap(model: nn.Module, config: RunConfig, world: World) -> nn.Module:
    """`model`, compiled where the config says so, with its gradients averaged over the ranks.

    Frozen parameters (the teacher) have no gradient and stay outside the sync. A world of one has none.
    """
    if config.compile:
        model.compile(dynamic=False)
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Context in which a backward pass averages gradients over the ranks, or only adds them up locally."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    context: AbstractContextManager[None] = model.no_sync()
    return context
