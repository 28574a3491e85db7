"""The real command line, in a process that also writes down every sample that it trains on.

    python recorded.py FOLDER pretrain --data ...

Each pass of each step is a line of FOLDER/rank-R.jsonl: the process's place, and of each sample its epoch,
its index and a digest of its views and of the patches that it shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from lmim_fast import cli
from lmim_fast.train.step import TrainStep


@contextlib.contextmanager
def recording(folder: Path) -> Iterator[None]:
    """A block in which this process writes down what it trains on."""
    rank, differentiate = int(os.environ.get("RANK", "0")), TrainStep._differentiate

    def recorded(self, batch):
        views = [view for view in batch.views() if view is not None]
        tensors = [*views, *self.task.draw_patches(batch.epochs, batch.indices)]
        samples = []
        for row, sample in enumerate(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)):
            digest = hashlib.blake2b(digest_size=8)
            for tensor in tensors:
                digest.update(tensor[row].contiguous().numpy().tobytes())
            samples.append([*sample, digest.hexdigest()])
        line = {"step": batch.step, "micro": batch.micro, "rank": rank, "samples": samples}
        with (folder / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return differentiate(self, batch)

    TrainStep._differentiate = recorded
    try:
        yield
    finally:
        TrainStep._differentiate = differentiate


if __name__ == "__main__":
    with recording(Path(sys.argv[1])):
        code = cli.main(sys.argv[2:])
    sys.exit(code)
