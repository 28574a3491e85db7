"""The order of samples of mixed data: each group of records takes its weight's share of every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from lmim_fast.data.order import Int64Array, SampleOrder
from lmim_fast.errors import UsageError


class MixedOrder(SampleOrder):
    """A `SampleOrder` in which groups of records have weights.

    An epoch has as many places as there are records. Each group has the same number of them in every epoch,
    its share by weight (largest remainder); a permutation shuffles whose place is where. A group fills its
    places with its own stream: one permutation of its records after the other, so none comes twice before all
    came once. The epochs returned are those of the group's stream: a pair (epoch, index) never repeats.
    Everything is a function of (seed, step).

    Args:
        groups:     (first index, count) of each; together 0 .. N - 1 once, in any order.
        weights:    share of each group in an epoch; their sum counts as 1.
        batch_size: samples of one optimiser step, over all processes and accumulation steps.
        seed:       64 bits are used.
    Raises:
        UsageError: a weight so small that the group gets no place.
        ValueError: groups that overlap, are empty or leave records out; weights that are not one positive
            number for each group; batch_size out of range.
    """

    def __init__(
        self, groups: Sequence[tuple[int, int]], weights: Sequence[float], batch_size: int, seed: int
    ) -> None:
        _check(groups, weights)
        super().__init__(sum(count for _, count in groups), batch_size, seed)
        self.groups = list(groups)
        self.shares = _shares(self.num_samples, weights)
        """Places of each group in an epoch."""
        for (first, count), weight, share in zip(groups, weights, self.shares, strict=True):
            if not share:
                raise UsageError(
                    f"weight {weight:g} gives none of {self.num_samples} samples of an epoch to the records"
                    f" {first} .. {first + count - 1}; raise it or leave the data out"
                )
        self._orders = [
            SampleOrder(count, batch_size, _group_seed(seed, number))
            for number, (_, count) in enumerate(groups)
        ]
        self._by_first = sorted(range(len(groups)), key=lambda number: groups[number][0])
        self._firsts = np.array([groups[number][0] for number in self._by_first])
        self._layouts: dict[int, tuple[NDArray[np.uint16], NDArray[np.uint32]]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_layouts": {}}

    def substitute(self, epoch: int, index: int, attempt: int) -> int:
        """The attempt-th (from 0) candidate to stand in for a broken record: any other one of its group."""
        if not 0 <= index < self.num_samples:
            raise ValueError(f"index must be in [0, {self.num_samples}), got {index}")
        group = self._by_first[int(np.searchsorted(self._firsts, index, side="right")) - 1]
        first = self.groups[group][0]
        return first + self._orders[group].substitute(epoch, index - first, attempt)

    def places(self, first: int, size: int) -> tuple[Int64Array, Int64Array]:
        """Group epochs and sample indices, (size,) int64 each, of the stream's places from `first` on."""
        epochs = np.empty(size, dtype=np.int64)
        indices = np.empty(size, dtype=np.int64)
        done = 0
        while done < size:
            epoch, place = divmod(first + done, self.num_samples)
            stop = min(place + size - done, self.num_samples)
            here = slice(done, done + stop - place)
            epochs[here], indices[here] = self._in_epoch(epoch, place, stop)
            done += stop - place
        return epochs, indices

    def _in_epoch(self, epoch: int, start: int, stop: int) -> tuple[Int64Array, Int64Array]:
        """The places start .. stop - 1 of one epoch of the mixture."""
        owners, ranks = (part[start:stop] for part in self._layout(epoch))
        epochs = np.empty(stop - start, dtype=np.int64)
        indices = np.empty(stop - start, dtype=np.int64)
        for group in np.unique(owners).tolist():
            mine = np.flatnonzero(owners == group)
            # A group's ranks ascend by one from place to place, so its part of the stream has no gaps.
            position = epoch * self.shares[group] + int(ranks[mine[0]])
            epochs[mine], own = self._orders[group].places(position, len(mine))
            indices[mine] = own + self.groups[group][0]
        return epochs, indices

    def _layout(self, epoch: int) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
        """Group of each place of an epoch, and the number of its places before; the two last are kept."""
        layout = self._layouts.get(epoch)
        if layout is None:
            edges = np.array(list(accumulate(self.shares)))
            owners = np.searchsorted(edges, self._permutation(epoch), side="right").astype(np.uint16)
            ranks = np.empty(self.num_samples, dtype=np.uint32)
            for group, share in enumerate(self.shares):
                ranks[owners == group] = np.arange(share, dtype=np.uint32)
            layout = owners, ranks
            # A new dict each time, so that threads never see one change under them.
            self._layouts = {**dict(list(self._layouts.items())[-1:]), epoch: layout}
            self._permutations = {}  # the layout replaces it
        return layout


def _check(groups: Sequence[tuple[int, int]], weights: Sequence[float]) -> None:
    if not groups or len(groups) > 2**16:
        raise ValueError(f"groups must be 1 to {2**16}, got {len(groups)}")
    end = 0
    for first, count in sorted(groups):
        if count < 1 or first != end:
            raise ValueError(
                f"groups must hold each record from 0 on once, none may be empty; got {list(groups)}"
            )
        end += count
    if len(weights) != len(groups) or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights must be {len(groups)} positive numbers, got {list(weights)}")


def _shares(places: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `places`, as near to the weights as can be: largest remainder first."""
    exact = [Fraction(weight) for weight in weights]
    whole = sum(exact)
    quotas = [places * weight / whole for weight in exact]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda number: shares[number] - quotas[number])
    for number in by_remainder[: places - sum(shares)]:
        shares[number] += 1
    return shares


def _group_seed(seed: int, group: int) -> int:
    """A seed for the group's stream, unrelated to that of the places and of other groups."""
    return int.from_bytes(hashlib.blake2b(f"{seed % 2**64} {group}".encode(), digest_size=8).digest())
