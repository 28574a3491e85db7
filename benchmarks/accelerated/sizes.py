"""What third-party models are scaled to, and random inputs of that size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """What a model is scaled to; images are square."""

    width: int
    heads: int
    depth: int
    image: int
    patch: int
    batch: int

    @property
    def tokens(self) -> int:
        """Patches of an image, and the length of a sequence."""
        return (self.image // self.patch) ** 2


SIZES = {
    "tiny": Size(width=64, heads=2, depth=1, image=16, patch=8, batch=1),
    "small": Size(width=64, heads=2, depth=2, image=32, patch=8, batch=2),
    "working": Size(width=384, heads=6, depth=2, image=160, patch=16, batch=4),
    "device": Size(width=384, heads=6, depth=12, image=256, patch=16, batch=128),
}

Built = tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]
Builder = Callable[[Size, bool], Built]
"""(size, random) to a model, its inputs and its options; `random`: with its own dropout and drop path."""


def images(size: Size) -> Tensor:
    """(B, 3, S, S)."""
    return torch.randn(size.batch, 3, size.image, size.image)


def sequence(size: Size) -> Tensor:
    """(B, N, D)."""
    return torch.randn(size.batch, size.tokens, size.width)


def ids(size: Size) -> Tensor:
    """(B, N) token ids below 100."""
    return torch.randint(100, (size.batch, size.tokens))
