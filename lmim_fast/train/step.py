"""One optimiser step of a process: passes over its micro batches, means over the ranks, AdamW.

It is a function of (weights, optimiser, seed, step) and reads nothing back to the host, so that it can be one
CUDA graph too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lmim_fast.config import PretrainConfig
from lmim_fast.data.batch import Batch
from lmim_fast.ops import attention_backends
from lmim_fast.ops.masking import draw_patches
from lmim_fast.ops.philox import Stream
from lmim_fast.ops.photometric import ColorProgram
from lmim_fast.train import graph, optim, parallel
from lmim_fast.train.start import needs_teacher
from lmim_fast.train.world import World


class TrainStep:
    """Callable: (step, micro batches, learning rate) to the step's four numbers.

    Args:
        model:     in training mode on the world's device; its weights and gradients are changed.
        optimizer: of its parameters, from `optim.make_optimizer`.
        config:    of the run; with `cuda_graph`, `capture_graph` comes before the first step.
        world:     the ranks that gradients and losses are averaged over; a graph is for one alone.
        capture:   what captures a graph; tests put another one in its place.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.SkippingAdamW,
        config: PretrainConfig,
        world: World,
        *,
        capture: Callable[..., graph.Captured] = graph.capture,
    ) -> None:
        if config.compile:
            model.compile(dynamic=False)
        self._model, self._synced = model, parallel.wrap(model, world)
        self._optimizer, self._config, self._world = optimizer, config, world
        self._capture = capture
        self._graph: graph.GraphedStep | None = None
        self._hold: Tensor | None = None
        """0-d, 1 while a graph is warmed up: such steps must not change a weight."""

    def capture_graph(self, batch: Batch) -> None:
        """Capture the step as a CUDA graph for batches of these shapes; weights and moments stay as they are.

        Before the input pipeline starts: its threads may wait for the device, which ends a capture.
        """
        device = self._world.device
        self._hold = torch.ones((), device=device)
        self._optimizer.make_state()  # in the memory of all steps, not in that of the warm-up
        self._graph = graph.GraphedStep(
            lambda *fixed: self._update(self._differentiate(_with_tensors(batch, fixed))),
            [tensor.to(device) for tensor in _tensors(batch)],
            capture=self._capture,
        )
        self._hold.zero_()

    def __call__(self, step: int, batches: Iterable[Batch], lr: float) -> Tensor:
        """Run a step.

        Args:
            step:    optimiser steps done so far.
            batches: `config.accumulation` of them; the next is asked for when the one before is worked on.
            lr:      learning rate.
        Returns:
            (4,) loss, loss_recon, loss_align, gradient norm, on the device; where one is not finite, on any
            rank, no weight has changed.
        """
        config, world = self._config, self._world
        optim.set_learning_rate(self._optimizer, lr)
        if self._graph is not None:
            (batch,) = batches
            torch.manual_seed(dropout_seed(config.seed, step, 0, world.rank))
            return self._graph(*_tensors(batch))
        losses = torch.zeros(3, device=world.device)
        for micro, batch in enumerate(batches):
            torch.manual_seed(dropout_seed(config.seed, step, micro, world.rank))
            with parallel.gradient_sync(self._synced, enabled=micro == config.accumulation - 1):
                losses += self._differentiate(batch)
        return self._update(losses)

    def _differentiate(self, batch: Batch) -> Tensor:
        """(3,) losses of a micro batch, whose gradients are added to those of the parameters."""
        parts = losses_of(self._synced, batch, self._config, self._world.device) / self._config.accumulation
        parts[0].backward()
        return parts.detach()

    def _update(self, losses: Tensor) -> Tensor:
        self._world.mean_(losses)
        norm = optim.gradient_norm(self._model)
        row = torch.cat([losses, norm.reshape(1)])
        # Losses and gradients are the same on all ranks by now, so all skip together; no host asks.
        skip = 1.0 - row.isfinite().all().float()
        if self._hold is not None:
            skip = torch.maximum(skip, self._hold)
        if self._config.optim.clip_norm is not None:
            optim.clip_gradients(self._model, norm, self._config.optim.clip_norm)
        self._optimizer.step_unless(skip)
        self._optimizer.zero_grad(set_to_none=True)
        return row


def losses_of(model: nn.Module, batch: Batch, config: PretrainConfig, device: torch.device) -> Tensor:
    """(3,) loss, loss_recon and loss_align of a micro batch; the first carries the gradient."""
    # Pixel targets are made from the image and would inherit its rounding.
    low = config.precision == "bf16" and needs_teacher(config)
    images, guidance = batch.views(torch.bfloat16 if low else torch.float32)
    epochs = batch.epochs.to(device, non_blocking=True)
    indices = batch.indices.to(device, non_blocking=True)
    lmim = config.objective == "lmim"
    ratio, stream = (
        (config.model.mask_ratio, Stream.MASK) if lmim else (config.model.mae_mask_ratio, Stream.MAE_MASK)
    )
    patches = config.model.num_patches
    ids = draw_patches(config.seed, epochs, indices, patches, int(patches * (1 - ratio)), stream)
    with (
        _repeatable_attention(config, device),
        torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"),
    ):
        output = model(images, guidance, patches=ids) if lmim else model(images, patches=ids)
    return torch.stack([output.loss, output.loss_recon, output.loss_align])


def _repeatable_attention(config: PretrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """Attention that gives the same bits every time: PyTorch's fp32 one on CUDA adds in changing order."""
    if device.type == "cuda" and config.precision == "fp32" and attention_backends.current() == "auto":
        return attention_backends.backend("eager")
    return contextlib.nullcontext()


def blank_batch(config: PretrainConfig, device: torch.device) -> Batch:
    """A batch of zeros with the shapes of a process's batches, where it has no peers."""
    size, (height, width) = config.batch_size // config.accumulation, config.model.image_size
    numbers, pixels = torch.zeros(size, dtype=torch.int64), (size, height, width)
    plain = torch.zeros((*pixels, 3), dtype=torch.uint8, device=device)
    if config.objective == "mae" or not config.model.guidance:
        return Batch(0, 0, numbers, numbers, plain, None, None)
    affine, value = torch.zeros((size, 3, 4), device=device), torch.zeros(size, device=device)
    coverage = torch.zeros(pixels, dtype=torch.uint8, device=device)
    border = torch.zeros((size, 3), device=device)
    colors = ColorProgram(affine, value, value > 0, affine, coverage, border, value, affine)
    return Batch(0, 0, numbers, numbers, plain, plain, colors)


def dropout_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Seed of torch's generator for one forward pass, so that a resume need not store the generator."""
    key = f"dropout {seed} {step} {micro} {rank}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


_COLORS = [field.name for field in dataclasses.fields(ColorProgram)]


def _tensors(batch: Batch) -> list[Tensor]:
    """All that a step reads of a batch."""
    tensors = [batch.epochs, batch.indices, batch.plain]
    if batch.warped is not None:
        tensors.append(batch.warped)
    if batch.program is not None:
        tensors += [getattr(batch.program, name) for name in _COLORS]
    return tensors


def _with_tensors(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    """The batch with other tensors in the places of `_tensors`."""
    found = iter(tensors)
    replaced = dataclasses.replace(batch, epochs=next(found), indices=next(found), plain=next(found))
    if batch.warped is not None:
        replaced.warped = next(found)
    if batch.program is not None:
        replaced.program = ColorProgram(*found)
    return replaced
