"""Means of gradients and losses over the ranks, for each way that processes share a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lmim_fast.train.world import World


class LocalGradients:
    """One process: its gradients are those of the batch."""

    def collect(self, last: bool) -> None:
        """Nothing."""

    def average_(self, losses: Tensor) -> None:
        """Nothing."""


class FlatGradients:
    """A whole model in each process: one buffer for each dtype of gradients, one all-reduce for each buffer.

    The losses travel at the end of the fp32 buffer. No hook and no bucket: the same calls in the same order
    at every step, so that they can be part of a CUDA graph. With two ranks the sums are bitwise those of
    DistributedDataParallel; with more, its buckets may add up in another order.

    Args:
        model: on its device; a parameter without a gradient on this rank must have none on the others.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._views: list[Tensor] = []

    def collect(self, last: bool) -> None:
        """Nothing: gradients add up in `grad`, where autograd puts them."""

    @torch.no_grad()
    def average_(self, losses: Tensor) -> None:
        """Replace gradients, and `losses` (k,) in place, by their means over the ranks."""
        if not self._buffers:
            self._make_buffers(losses)
        *views, loss_view = self._views
        used = [(p, p.grad, view) for p, view in zip(self._trained, views, strict=True) if p.grad is not None]
        torch._foreach_copy_([view for *_, view in used] + [loss_view], [g for _, g, _ in used] + [losses])
        for buffer in self._buffers.values():
            self._world.mean_(buffer)
        for parameter, _, view in used:
            parameter.grad = view
        losses.copy_(loss_view)

    def _make_buffers(self, losses: Tensor) -> None:
        """Memory for all gradients and the losses, and a view of it for each of them."""
        tensors = [*self._trained, losses]
        sizes: dict[torch.dtype, int] = {}
        for tensor in tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        self._buffers = {
            dtype: torch.zeros(size, dtype=dtype, device=losses.device) for dtype, size in sizes.items()
        }
        filled = dict.fromkeys(sizes, 0)
        for tensor in tensors:
            start = filled[tensor.dtype]
            filled[tensor.dtype] += tensor.numel()
            self._views.append(self._buffers[tensor.dtype][start : filled[tensor.dtype]].view(tensor.shape))


class ShardedGradients:
    """A model split by FSDP2, which reduces gradients in the backward pass."""

    def __init__(self, model: FSDPModule, world: World) -> None:
        self._model, self._world = model, world

    def collect(self, last: bool) -> None:
        """Reduce in the last pass of a step only; before it the sums stay on the rank."""
        self._model.set_requires_gradient_sync(last)

    def average_(self, losses: Tensor) -> None:
        """Replace `losses` (k,), in place, by their mean over the ranks."""
        self._world.mean_(losses)
