"""The order of samples: an endless stream with random access by step.

The stream is one permutation of all samples after another; step s takes its places s * batch_size and on.
Every number is a function of (seed, epoch, index), so a resume needs the step and nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lmim_fast.errors import UsageError
from lmim_fast.ops import philox

_CHUNK = 1 << 16  # samples drawn at once: the int64 temporaries stay in the cache

Int64Array = NDArray[np.int64]


class SampleOrder:
    """Epochs and indices of any global batch; batches straddle epochs, nothing is dropped.

    Args:
        num_samples: N, 1 <= N < 2^32.
        batch_size:  samples of one optimiser step, over all processes and accumulation steps.
        seed:        64 bits are used.
    Raises:
        ValueError: num_samples or batch_size out of range.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        if not 1 <= num_samples < 2**32:
            raise ValueError(f"num_samples must be in [1, 2^32), got {num_samples}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self._permutations: dict[int, NDArray[np.uint32]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_permutations": {}}  # cheaper to compute again than to send

    def batch(self, step: int) -> tuple[Int64Array, Int64Array]:
        """Epochs and sample indices, (batch_size,) int64 each, of the global batch of `step` >= 0."""
        return self._slice(step, 0, self.batch_size)

    def share(
        self, step: int, rank: int, world_size: int, micro: int, accumulation: int
    ) -> tuple[Int64Array, Int64Array]:
        """What one process takes in one accumulation pass: b = batch_size / (world_size * accumulation).

        The passes of a step follow one another in the global batch, the ranks within a pass.

        Returns:
            Epochs and sample indices, (b,) int64 each: the batch from (micro * world_size + rank) * b on.
        Raises:
            UsageError: the batch does not divide evenly.
            ValueError: rank or micro out of range.
        """
        size = self.share_size(world_size, accumulation)
        if not (0 <= rank < world_size and 0 <= micro < accumulation):
            raise ValueError(
                f"need 0 <= rank < {world_size}, 0 <= micro < {accumulation}; got rank {rank}, micro {micro}"
            )
        return self._slice(step, (micro * world_size + rank) * size, size)

    def share_size(self, world_size: int, accumulation: int) -> int:
        """Samples of one share.

        Raises:
            UsageError: the batch does not divide evenly.
        """
        parts = world_size * accumulation
        if parts < 1 or self.batch_size % parts:
            raise UsageError(
                f"batch_size {self.batch_size} must be a multiple of world_size x accumulation"
                f" = {world_size} x {accumulation} = {parts}"
            )
        return self.batch_size // parts

    def substitute(self, epoch: int, index: int, attempt: int) -> int:
        """The attempt-th (from 0) candidate to stand in for a broken record: any other sample, uniform."""
        if not 0 <= index < self.num_samples:
            raise ValueError(f"index must be in [0, {self.num_samples}), got {index}")
        if attempt < 0:
            raise ValueError(f"attempt must be >= 0, got {attempt}")
        if self.num_samples == 1:
            return index
        block = 4 * (attempt + 1)  # block 0 of this sample's draws is its place in the permutation
        words = philox.uint32(self.seed, epoch, torch.tensor([index]), block + 2, philox.Stream.ORDER)[
            0, block:
        ]
        high, low = words.tolist()
        candidate = (high << 32 | low) % (self.num_samples - 1)
        return candidate + (candidate >= index)

    def places(self, first: int, size: int) -> tuple[Int64Array, Int64Array]:
        """Epochs and sample indices, (size,) int64 each, of the stream's places from `first` >= 0 on."""
        epochs, places = np.divmod(np.arange(first, first + size, dtype=np.int64), self.num_samples)
        indices = np.empty(size, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = self._permutation(epoch)[places[here]]
        return epochs, indices

    def _slice(self, step: int, start: int, size: int) -> tuple[Int64Array, Int64Array]:
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        return self.places(step * self.batch_size + start, size)

    def _permutation(self, epoch: int) -> NDArray[np.uint32]:
        """Order of the samples in one epoch; the two computed last are kept."""
        permutation = self._permutations.get(epoch)
        if permutation is None:
            permutation = np.argsort(self._sort_keys(epoch), kind="stable").astype(np.uint32)
            # A new dict each time, so that threads never see one change under them.
            self._permutations = {**dict(list(self._permutations.items())[-1:]), epoch: permutation}
        return permutation

    def _sort_keys(self, epoch: int) -> NDArray[np.uint64]:
        keys = np.empty(self.num_samples, dtype=np.uint64)
        for start in range(0, self.num_samples, _CHUNK):
            stop = min(start + _CHUNK, self.num_samples)
            words = philox.uint32(self.seed, epoch, torch.arange(start, stop), 2, philox.Stream.ORDER).numpy()
            high, low = words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)
            keys[start:stop] = high << np.uint64(32) | low
        return keys
