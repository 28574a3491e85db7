"""What keys the noise of augmented views."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Keys(NamedTuple):
    """Seed, and B epochs and sample indices."""

    seed: int
    epochs: Tensor
    """(B,) int64."""
    indices: Tensor
    """(B,) int64."""

    def take(self, rows: NDArray[np.int64]) -> Keys:
        """The keys of some of the samples."""
        chosen = torch.from_numpy(rows)
        return Keys(self.seed, self.epochs[chosen], self.indices[chosen])

    def to(self, device: torch.device) -> Keys:
        """The same keys on `device`."""
        return Keys(self.seed, self.epochs.to(device), self.indices.to(device))
