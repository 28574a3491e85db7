"""Whether a transform is at work that autograd functions without a rule for it cannot go through."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad


def transformed() -> bool:
    """Inside a torch.func transform or forward-mode differentiation."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


# torch.compile asks it once, while it traces; as torch.compiler.assume_constant_result, without its import.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]
