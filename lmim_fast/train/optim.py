"""AdamW, its groups of parameters, the average of the weights, and the learning rate of every step."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lmim_fast.config import OptimConfig, RunConfig

_BLOCK = re.compile(r"blocks\.(\d+)\.")
# Of torch's OneCycleLR: the peak over the first rate, and the first rate over the last one.
_ONE_CYCLE_START, _ONE_CYCLE_END = 25.0, 1e4
_AVERAGE = "average"  # beside the moments in a parameter's state, so that a checkpoint holds it


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: two or more dimensions decay, 1-d ones do not.

    The cls and mask tokens are (1, 1, D), so they decay, as released. Frozen parameters (position tables,
    the teacher) are in no group.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]


def layer_groups(
    model: nn.Module, encoder: str, depth: int, *, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """The trainable parameters by layer and decay, each group with its `lr_scale`.

    Args:
        encoder:      name of the encoder in the model: its patch embedding and cls are the lowest layer, each
                      of its `depth` blocks is one; its final norm and all other parts are the highest.
        weight_decay: of tensors with two or more dimensions; cls does not decay.
        layer_decay:  factor from the learning rate of a layer to that of the one below it.
    Source: layer-wise decay of BEiT (arXiv 2106.08254), as in LMIM's fine-tuning.
    """
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = name.removeprefix(encoder + ".") if name.startswith(encoder + ".") else ""
        block = _BLOCK.match(inside)
        layer = int(block[1]) + 1 if block else depth + 1
        if inside.startswith(("cls_token", "patch_embed.")):
            layer = 0
        decay = weight_decay if parameter.dim() >= 2 and inside != "cls_token" else 0.0
        groups.setdefault((layer, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": layer_decay ** (depth + 1 - layer)}
        for (layer, decay), parameters in groups.items()
    ]


class SkippingAdamW(torch.optim.AdamW):
    """Fused AdamW whose step can be skipped by a device flag, without asking the host."""

    found_inf: Tensor | None
    average_decay = 0.0
    """Decay per step of the average of the weights; 0: there is none."""

    def step_unless(self, skip: Tensor) -> None:
        """One update, or none at all where `skip` is 1.

        Args:
            skip: 0-d fp32 tensor on the parameters' device, 0 or 1.
        """
        fresh = self._weights_without_average() if self.average_decay else {}
        # The fused kernel reads `found_inf` on the device, as `torch.amp.GradScaler` has it do.
        self.found_inf = skip
        self.step()
        self.found_inf = None
        for parameter, weights in fresh.items():
            self.state[parameter][_AVERAGE] = weights
        if self.average_decay:
            self._average(skip)

    def _weights_without_average(self) -> dict[Tensor, Tensor]:
        """Copies of the weights whose average begins now."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        return {p: p.detach().clone() for p in parameters if _AVERAGE not in self.state.get(p, {})}

    @torch.no_grad()
    def _average(self, skip: Tensor) -> None:
        weights = [p for group in self.param_groups for p in group["params"] if p in self.state]
        averages = [self.state[parameter][_AVERAGE] for parameter in weights]
        moves = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(moves, (1.0 - self.average_decay) * (1.0 - skip))
        torch._foreach_add_(averages, moves)

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
    groups: list[dict[str, Any]], config: OptimConfig, *, graphed: torch.device | None = None
) -> SkippingAdamW:
    """AdamW over groups of parameters; `set_learning_rate` comes before every step.

    Args:
        groups:  parameters with their `weight_decay` and, where it is not 1, `lr_scale`.
        graphed: the device of a CUDA graph that the steps will be part of; None: they will not.
    """
    capturable = graphed is not None
    for group in groups:
        # A graph reads the rate from the device: a number would be captured for good.
        group["lr"] = torch.zeros((), device=graphed) if capturable else 0.0
    optimizer = SkippingAdamW(groups, betas=config.betas, eps=config.eps, fused=True, capturable=capturable)
    optimizer.average_decay = config.ema_decay
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, scaled for each group; in fp32, as a graph reads it, so both forms agree."""
    for group in optimizer.param_groups:
        scaled = torch.tensor(lr * group.get("lr_scale", 1.0), dtype=torch.float32).item()
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


@contextlib.contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A block in which the parameters have their averaged values, where an average is kept."""
    kept = [(parameter, state[_AVERAGE]) for parameter, state in optimizer.state.items() if _AVERAGE in state]
    with torch.no_grad():
        for parameter, average in kept:
            _swap(parameter, average)
        try:
            yield
        finally:
            for parameter, average in kept:
                _swap(parameter, average)


def _swap(one: Tensor, other: Tensor) -> None:
    copy = one.clone()
    one.copy_(other)
    other.copy_(copy)


def peak_learning_rate(config: RunConfig) -> float:
    """The highest learning rate of the run: `optim.lr` as it is, or scaled by the batch when that is None."""
    if config.optim.lr is not None:
        return config.optim.lr
    return config.optim.base_lr * config.batch_size / 256


def total_steps(config: RunConfig, num_samples: int) -> int:
    """Optimiser steps of the run."""
    if config.steps is not None:
        return config.steps
    return math.ceil(config.epochs * num_samples / config.batch_size)


def warmup_steps(config: RunConfig, num_samples: int) -> int:
    """Optimiser steps of the linear warm-up."""
    if config.optim.warmup_steps is not None:
        return config.optim.warmup_steps
    return round(config.optim.warmup_epochs * num_samples / config.batch_size)


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, schedule: str = "cosine", final: float = 0.0
) -> float:
    """Learning rate of the step that follows `step` finished ones.

    "cosine": linear from 0 over `warmup` steps (so the very first step moves nothing, as released), then a
    half-cosine that reaches `final` at `total`. "one_cycle": half-cosines from a 25th of the peak up to it
    over `warmup` steps, and down to `final`, or if that is 0 to a 250,000th of the peak.
    Source: LMIM's recipe; torch's OneCycleLR.
    """
    start = 0.0
    if schedule == "one_cycle":
        start = peak / _ONE_CYCLE_START
        final = final or start / _ONE_CYCLE_END
    if step < warmup:
        rise = step / warmup
        if schedule == "one_cycle":
            rise = 0.5 * (1.0 - math.cos(math.pi * rise))
        return start + (peak - start) * rise
    progress = (step - warmup) / max(1, total - warmup)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Global L2 norm of their gradients, 0-d, on the device; of a split model, that of the whole one."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    split = gradients[0]
    if not isinstance(split, DTensor):
        return nn.utils.get_total_norm(gradients)
    square = nn.utils.get_total_norm([cast(DTensor, part).to_local() for part in gradients]).square()
    dist.all_reduce(square, group=split.device_mesh.get_group("shard"))
    return square.sqrt()


def clip_gradients(parameters: Sequence[Tensor], norm: Tensor, largest: float) -> None:
    """Scale the gradients so that their global norm, now `norm`, is at most `largest`."""
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)
