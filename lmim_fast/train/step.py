"""One optimiser step of a process: passes over its micro batches, means over the ranks, AdamW.

It is a function of (weights, optimiser, seed, step) and reads nothing back to the host, so that it can be one
CUDA graph too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lmim_fast.data.batch import Batch
from lmim_fast.ops import products
from lmim_fast.train import graph, optim, parallel
from lmim_fast.train.task import Task
from lmim_fast.train.world import World


class TrainStep:
    """Callable: (step, micro batches, learning rate) to the step's losses and gradient norm.

    Args:
        model:     in training mode, after `parallel.apply`; its weights and gradients are changed.
        optimizer: of its parameters, from `optim.make_optimizer`.
        task:      of the run; with `cuda_graph` in its config, `capture_graph` comes before the first step.
        world:     the ranks that gradients and losses are averaged over; on CUDA that is part of the graph.
        capture:   what captures a graph; tests put another one in its place.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.SkippingAdamW,
        task: Task,
        world: World,
        *,
        capture: Callable[..., graph.Captured] = graph.capture,
    ) -> None:
        self._model, self._gradients = model, parallel.gradients(model, world)
        self._optimizer, self.task, self._config, self._world = optimizer, task, task.config, world
        self._capture = capture
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._copies = products.WeightCopies(parallel.copied_weights(model, self._config), torch.bfloat16)
        self._graph: graph.GraphedStep | None = None
        self._hold: Tensor | None = None
        """0-d, 1 while a graph is warmed up: such steps must not change a weight."""

    def capture_graph(self) -> None:
        """Capture the step as a CUDA graph for this rank's batches; weights and moments stay as they are.

        Before the input pipeline starts: its threads may wait for the device, which ends a capture.
        """
        images = self._config.batch_size // (self._config.accumulation * self._world.size)
        batch = self.task.blank_batch(images, self._world.device)
        device = self._world.device
        self._hold = torch.ones((), device=device)
        self._optimizer.make_state()  # in the memory of all steps, not in that of the warm-up
        self._graph = graph.GraphedStep(
            lambda *fixed: self._whole(batch.with_tensors(fixed)),
            [tensor.to(device) for tensor in batch.tensors()],
            capture=self._capture,
        )
        self._hold.zero_()

    def release(self) -> None:
        """Free the graph. Before the process groups end: NCCL waits for every graph that it is part of."""
        if self._graph is not None and self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        self._graph = None

    def __call__(self, step: int, batches: Iterable[Batch], lr: float) -> Tensor:
        """Run a step.

        Args:
            step:    optimiser steps done so far.
            batches: `config.accumulation` of them; the next is asked for when the one before is worked on.
            lr:      learning rate.
        Returns:
            (k + 1,) the task's losses and the gradient norm, on the device; if one is not finite, on any
            rank, no weight has changed.
        """
        config, world = self._config, self._world
        optim.set_learning_rate(self._optimizer, lr)
        if self._graph is not None:
            (batch,) = batches
            torch.manual_seed(dropout_seed(config.seed, step, 0, world.rank))
            return self._graph(*batch.tensors())
        losses = torch.zeros(len(self.task.loss_names), device=world.device)
        self._copies.refresh()
        for micro, batch in enumerate(batches):
            torch.manual_seed(dropout_seed(config.seed, step, micro, world.rank))
            self._gradients.collect(last=micro == config.accumulation - 1)
            losses += self._differentiate(batch)
        return self._update(losses)

    def _whole(self, batch: Batch) -> Tensor:
        """A step of one micro batch, as a graph holds it."""
        self._copies.refresh()  # in the graph, so that it sees the weights whoever has changed them
        return self._update(self._differentiate(batch))

    def _differentiate(self, batch: Batch) -> Tensor:
        """(k,) losses of a micro batch, whose gradients are added to those of the parameters."""
        with self._copies.read():
            parts = self.task.losses(self._model, batch) / self._config.accumulation
            parts[0].backward()  # in here too: activation checkpointing runs forward passes again
        return parts.detach()

    def _update(self, losses: Tensor) -> Tensor:
        self._gradients.average_(losses)
        norm = optim.gradient_norm(self._trained)
        row = torch.cat([losses, norm.reshape(1)])
        # Losses and gradients are the same on all ranks by now, so all skip together; no host asks.
        skip = 1.0 - row.isfinite().all().float()
        if self._hold is not None:
            skip = torch.maximum(skip, self._hold)
        if self._config.optim.clip_norm is not None:
            optim.clip_gradients(self._trained, norm, self._config.optim.clip_norm)
        self._optimizer.step_unless(skip)
        self._optimizer.zero_grad(set_to_none=True)
        return row


def dropout_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Seed of torch's generator for one forward pass, so that a resume need not store the generator."""
    key = f"dropout {seed} {step} {micro} {rank}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
