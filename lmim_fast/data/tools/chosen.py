"""An order whose one batch is chosen by hand, to see the views of these samples as training has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmim_fast.data.order import Int64Array, SampleOrder


class ChosenSamples(SampleOrder):
    """The chosen samples as batch 0; substitutes of broken records are those of the order they come from.

    Args:
        order:   the run's.
        epochs:  epoch of each chosen sample.
        indices: their numbers in the run's records.
    """

    def __init__(self, order: SampleOrder, epochs: Sequence[int], indices: Sequence[int]) -> None:
        super().__init__(order.num_samples, len(indices), order.seed)
        self._order = order
        self._epochs, self._indices = np.array(epochs, np.int64), np.array(indices, np.int64)

    def substitute(self, epoch: int, index: int, attempt: int) -> int:
        """As the order that the samples come from."""
        return self._order.substitute(epoch, index, attempt)

    def places(self, first: int, size: int) -> tuple[Int64Array, Int64Array]:
        """The chosen samples from number `first` on."""
        chosen = slice(first, first + size)
        return self._epochs[chosen], self._indices[chosen]
