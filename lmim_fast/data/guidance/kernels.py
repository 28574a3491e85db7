"""The convolution kernels of a batch in one array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Kernels:
    """B odd square kernels, one behind the other."""

    sides: NDArray[np.int64]
    """(B,) 1 where there is no filter."""
    taps: NDArray[np.float32]
    """(sum of sides^2,) rows of the first kernel, then those of the next."""

    @classmethod
    def of(cls, kernels: Sequence[NDArray[np.float32]]) -> Kernels:
        """From single kernels, (side, side) each."""
        sides = np.array([len(kernel) for kernel in kernels], np.int64)
        taps = [np.zeros(0, np.float32), *(kernel.ravel() for kernel in kernels)]
        return cls(sides, np.concatenate(taps))

    def __len__(self) -> int:
        return len(self.sides)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """Views of the single kernels, (side, side) each."""
        start = 0
        for side in self.sides.tolist():
            yield self.taps[start : start + side * side].reshape(side, side)
            start += side * side
