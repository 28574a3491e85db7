"""Whether a transform is at work that autograd functions cannot go through, or only out of place."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad


def transformed() -> bool:
    """Inside a torch.func transform or forward-mode differentiation."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


# torch.compile asks it once, while it traces; as torch.compiler.assume_constant_result, without its import.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def batched(grad: torch.Tensor) -> bool:
    """A gradient that stands for many (`is_grads_batched`): results must not be written in place."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(grad))
