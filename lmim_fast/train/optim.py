"""AdamW, its two groups of parameters, and the learning rate of every step. Source: LMIM's recipe."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lmim_fast.config import OptimConfig, PretrainConfig


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The trainable parameters in two groups: two or more dimensions decay, 1-d ones do not.

    The cls and mask tokens are (1, 1, D), so they decay, as released. Frozen parameters (position tables,
    the teacher) are in no group.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]


class SkippingAdamW(torch.optim.AdamW):
    """Fused AdamW whose step can be skipped by a device flag, without asking the host."""

    found_inf: Tensor | None

    def step_unless(self, skip: Tensor) -> None:
        """One update, or none at all where `skip` is 1.

        Args:
            skip: 0-d fp32 tensor on the parameters' device, 0 or 1.
        """
        # The fused kernel reads `found_inf` on the device, as `torch.amp.GradScaler` has it do.
        self.found_inf = skip
        self.step()
        self.found_inf = None

    def make_state(self) -> None:
        """Moments of parameters that have none yet, as a step makes them; nothing else changes."""
        fresh = [p for group in self.param_groups for p in group["params"] if p not in self.state]
        if not fresh:
            return
        for parameter in fresh:
            parameter.grad = torch.zeros_like(parameter)
        self.step_unless(torch.ones((), device=fresh[0].device))
        self.zero_grad(set_to_none=True)


def make_optimizer(
    model: nn.Module, config: OptimConfig, *, graphed: torch.device | None = None
) -> SkippingAdamW:
    """AdamW over the trainable parameters; `set_learning_rate` comes before every step.

    Args:
        graphed: the device of a CUDA graph that the steps will be part of; None: they will not.
    """
    groups = decay_groups(model, config.weight_decay)
    # A graph reads the rate from the device: a number would be captured for good.
    lr = 0.0 if graphed is None else torch.zeros((), device=graphed)
    capturable = graphed is not None
    return SkippingAdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True, capturable=capturable)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, of all groups; in fp32, as a graph reads it, so that both forms agree."""
    lr = torch.tensor(lr, dtype=torch.float32).item()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def peak_learning_rate(config: PretrainConfig) -> float:
    """The highest learning rate of the run: `optim.lr` as it is, or scaled by the batch when that is None."""
    if config.optim.lr is not None:
        return config.optim.lr
    return config.optim.base_lr * config.batch_size / 256


def total_steps(config: PretrainConfig, num_samples: int) -> int:
    """Optimiser steps of the run."""
    if config.steps is not None:
        return config.steps
    return math.ceil(config.epochs * num_samples / config.batch_size)


def warmup_steps(config: PretrainConfig, num_samples: int) -> int:
    """Optimiser steps of the linear warm-up."""
    if config.optim.warmup_steps is not None:
        return config.optim.warmup_steps
    return round(config.optim.warmup_epochs * num_samples / config.batch_size)


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Learning rate of the step that follows `step` finished ones.

    Linear from 0 over `warmup` steps (so the very first step moves nothing, as released), then a half-cosine
    that reaches 0 at `total`.
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def gradient_norm(model: nn.Module) -> Tensor:
    """Global L2 norm of the gradients, 0-d, on the device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


def clip_gradients(model: nn.Module, norm: Tensor, largest: float) -> None:
    """Scale the gradients so that their global norm, now `norm`, is at most `largest`."""
    nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
