"""What the input pipeline hands to a training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

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
    """(B, H, W, 3) uint8: the plain view; the augmented view, finished, where there is one."""
    warped: Tensor | None
    """(B, H, W, 3) uint8, filtered and warped but not yet coloured."""
    program: ColorProgram | None
    """The colours of the guidance view."""
    targets: Tensor | None = None
    """(B, T) int64 classes of the labels, EOS and PAD behind them; None without labels."""
    wait_seconds: float = 0.0
    """Time the consumer waited for this batch."""

    def views(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """Plain and guidance views, (B, 3, H, W) in [-1, 1] on the batch's device."""
        return photometric(self.plain, self.warped, self.program, dtype=dtype)

    def images(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The augmented or else the plain view, (B, 3, H, W) in [-1, 1] on the batch's device."""
        return photometric(self.plain, dtype=dtype)[0]

    @classmethod
    def blank(
        cls,
        size: int,
        image_size: tuple[int, int],
        device: torch.device,
        *,
        guided: bool,
        target_length: int = 0,
    ) -> Self:
        """Zeros in the shapes of `size` samples with views of `image_size`, and targets of that length."""
        numbers, pixels = torch.zeros(size, dtype=torch.int64), (size, *image_size)
        plain = torch.zeros((*pixels, 3), dtype=torch.uint8, device=device)
        targets = None
        if target_length:
            targets = torch.zeros((size, target_length), dtype=torch.int64, device=device)
        if not guided:
            return cls(0, 0, numbers, numbers, plain, None, None, targets)
        affine, value = torch.zeros((size, 3, 4), device=device), torch.zeros(size, device=device)
        coverage = torch.zeros(pixels, dtype=torch.uint8, device=device)
        border = torch.zeros((size, 3), device=device)
        colors = ColorProgram(affine, value, value > 0, affine, coverage, border, value, affine)
        return cls(0, 0, numbers, numbers, plain, plain, colors)

    def tensors(self) -> list[Tensor]:
        """All that a step reads of the batch."""
        views = [self.epochs, self.indices, self.plain]
        if self.warped is not None:
            views.append(self.warped)
        views += [] if self.program is None else self.program.tensors()
        return views + ([] if self.targets is None else [self.targets])

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The batch with other tensors in the places of `tensors()`."""
        rest = iter(tensors)
        batch = dataclasses.replace(self, epochs=next(rest), indices=next(rest), plain=next(rest))
        if self.warped is not None:
            batch.warped = next(rest)
        if self.program is not None:
            batch.program = ColorProgram(*(next(rest) for _ in self.program.tensors()))
        if self.targets is not None:
            batch.targets = next(rest)
        return batch
