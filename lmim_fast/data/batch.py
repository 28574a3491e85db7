"""What the input pipeline hands to a training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmim_fast.ops.photometric import ColorProgram, photometric


@dataclass
class Batch:
    """One micro-batch of this process."""

    step: int
    micro: int
    indices: Tensor
    """(B,) int64 on the CPU: the samples asked for, which key views and masks."""
    epochs: Tensor
    """(B,) int64 on the CPU."""
    plain: Tensor
    """(B, H, W, 3) uint8."""
    warped: Tensor | None
    """(B, H, W, 3) uint8, filtered and warped but not yet coloured."""
    program: ColorProgram | None
    """The colours of the guidance view."""
    wait_seconds: float = 0.0
    """Time the consumer waited for this batch."""

    def views(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """Plain and guidance views, (B, 3, H, W) in [-1, 1] on the batch's device."""
        return photometric(self.plain, self.warped, self.program, dtype=dtype)
