"""What else may differentiate a form: a transform, a second derivative, or many gradients at once.

Autograd functions that save memory or time write in place and keep less than a second derivative needs. Under
a transform their ops run PyTorch's own form instead; their backward passes differentiate it `by_autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor


def transformed() -> bool:
    """Inside a torch.func transform or forward-mode differentiation."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


# torch.compile asks it once, while it traces; as torch.compiler.assume_constant_result, without its import.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def batched(*grads: Tensor | None) -> bool:
    """One of the gradients stands for many: by `is_grads_batched`, or by vmap of a backward pass."""
    functorch = torch._C._functorch
    return any(
        grad is not None
        and (functorch.is_legacy_batchedtensor(grad) or functorch.is_functorch_wrapped_tensor(grad))
        for grad in grads
    )


def ordinary(*grads: Tensor | None) -> bool:
    """A backward pass with one gradient at a time, which is not differentiated itself."""
    return not torch.is_grad_enabled() and not batched(*grads)


def by_autograd(
    form: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of a form's inputs by autograd: many at once, and differentiable where grad mode is on.

    The form runs without autocast, whose casts the forward pass has made.

    Args:
        form:   of the inputs, without randomness; takes no other tensor that needs a gradient.
        inputs: as the forward pass has saved them, or recomputed in grad mode.
        needed: which of the inputs get a gradient; the others get None.
        grads:  of the form's results, None for those that have none.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        # Aliases: one input may be made from another, whose gradient here is its own share alone.
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        wanted = [alias for alias, need in zip(aliases, needed, strict=True) if need]
        results = form(*aliases)
    results = (results,) if isinstance(results, Tensor) else results
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    if not (pairs and wanted):
        return [None] * len(inputs)
    outputs, upstream = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needed]
