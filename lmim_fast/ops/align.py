"""The two branches of a packed pass, and the alignment of their cls features."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from lmim_fast.ops.transforms import by_autograd, ordinary, transformed

Stop = Literal["none", "masked", "guidance"]


def split_aligned(
    features: Tensor, batch: int, shown: int, full: int, *, stop_gradient: Stop = "none"
) -> tuple[Tensor, Tensor, Tensor]:
    """Split packed features into both branches; mean squared distance of their cls features, in fp32.

    One op, so that the gradients of its parts are written into one matrix: autograd's own would fill
    a matrix of zeros for each part and add them up.

    Args:
        features:      (batch * (shown + full), D) rows of the masked branch, then of the guidance branch.
        batch:         B.
        shown:         tokens of the masked branch, cls first.
        full:          tokens of the guidance branch, cls first.
        stop_gradient: the branch that the distance sends no gradient into.
    Returns:
        latent (B, shown, D), memory (B, full, D): views of features; the distance, a number.
    Raises:
        ValueError: features are no matrix of that many rows, or stop_gradient is unknown.
    Source: LMIM's alignment loss.
    """
    if features.dim() != 2 or features.shape[0] != batch * (shown + full):
        raise ValueError(
            f"features must be ({batch * (shown + full)}, D) for {batch} x ({shown} + {full}) tokens, "
            f"got {tuple(features.shape)}"
        )
    if stop_gradient not in ("none", "masked", "guidance"):
        raise ValueError(f'stop_gradient must be "none", "masked" or "guidance", got {stop_gradient!r}')
    if torch.compiler.is_compiling() or transformed():  # a compiler makes one kernel of the plain form
        return _plain(features, batch, shown, stop_gradient)
    result: tuple[Tensor, Tensor, Tensor] = _SplitAligned.apply(features, batch, shown, stop_gradient)
    return result


def _plain(features: Tensor, batch: int, shown: int, stop: Stop) -> tuple[Tensor, Tensor, Tensor]:
    latent, memory = _split(features, batch, shown)
    ends = latent[:, 0], memory[:, 0]
    return latent, memory, _distance(*_stopped(ends, stop)).square().mean()


def _split(features: Tensor, batch: int, shown: int) -> tuple[Tensor, Tensor]:
    rows = batch * shown
    width = features.shape[1]
    return features[:rows].view(batch, -1, width), features[rows:].view(batch, -1, width)


def _distance(masked: Tensor, guidance: Tensor) -> Tensor:
    high = torch.float64 if masked.dtype == torch.float64 else torch.float32
    return masked.to(high) - guidance.to(high)


def _stopped(ends: tuple[Tensor, Tensor], stop: Stop) -> tuple[Tensor, Tensor]:
    masked, guidance = ends
    return masked.detach() if stop == "masked" else masked, (
        guidance.detach() if stop == "guidance" else guidance
    )


class _SplitAligned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, batch: int, shown: int, stop: Stop
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        latent, memory = _split(features, batch, shown)
        distance = _distance(latent[:, 0], memory[:, 0])
        ctx.save_for_backward(features, distance)  # views of the features are results: they are there anyway
        ctx.shown, ctx.stop = shown, stop
        return latent, memory, distance.square().mean()

    @staticmethod
    def backward(
        ctx: Any, grad_latent: Tensor | None, grad_memory: Tensor | None, grad_loss: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        features, distance = ctx.saved_tensors
        grads = grad_latent, grad_memory, grad_loss
        if not ordinary(*grads):
            form = functools.partial(_plain, batch=len(distance), shown=ctx.shown, stop=ctx.stop)
            return by_autograd(form, (features,), (True,), grads)[0], None, None, None
        grad = torch.empty_like(features)
        parts = _split(grad, len(distance), ctx.shown)
        for part, given in zip(parts, (grad_latent, grad_memory), strict=True):
            part.zero_() if given is None else part.copy_(given)
        if grad_loss is not None:
            change = (distance * (grad_loss * (2 / distance.numel()))).to(features.dtype)
            if ctx.stop != "masked":
                parts[0][:, 0] += change
            if ctx.stop != "guidance":
                parts[1][:, 0] -= change
        return grad, None, None, None
