"""What is done to a model that several processes train: the model knows nothing of it."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lmim_fast.train.world import World


def wrap(model: nn.Module, world: World) -> nn.Module:
    """`model` with its gradients averaged over the ranks; itself in a world of one.

    Frozen parameters (the teacher) have no gradient and stay outside the sync.
    """
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
