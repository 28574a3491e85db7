"""The prediction against a measured run: two gloo processes on this machine, one core each.

The parts are measured apart: steps of both ranks at the same time without communication (so that they share
the machine as in the whole), the all-reduce of the flat gradient buffer alone, and whole steps.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.machine import describe
from benchmarks.scaling_model import FP32, Times
from benchmarks.scaling_step import Traffic, gpu_seconds
from lmim_fast.config import ModelConfig, PresetName, preset
from lmim_fast.models.lmim import LMIM

RANKS = 2
_PARTS = ("compute_ms", "allreduce_ms", "step_ms")


def predicted_ms(measured: dict[str, Any]) -> float:
    """The step that the model makes of the measured parts; only `replicate` is checked.

    Raises:
        ValueError: another mode.
    """
    if measured["mode"] != "replicate":
        raise ValueError(f'mode must be "replicate", got {measured["mode"]!r}')
    times = Times(0.0, measured["compute_ms"] / 1e3, 0.0)
    return 1e3 * gpu_seconds(times, Traffic(last=measured["allreduce_ms"] / 1e3))


def report(measured: dict[str, Any]) -> str:
    """Predicted against measured, a line each."""
    predicted, step = predicted_ms(measured), measured["step_ms"]
    rate = measured["gradient_bytes"] / measured["allreduce_ms"] / 1e6  # two ranks send the buffer once
    lines = [
        f"one rank's step {measured['compute_ms']:,.1f} ms, all-reduce of "
        f"{measured['gradient_bytes'] / 1e6:,.1f} MB {measured['allreduce_ms']:,.1f} ms ({rate:.2f} GB/s)",
        f"predicted step of two ranks {predicted:,.1f} ms",
        f"measured step of two ranks  {step:,.1f} ms",
        f"predicted / measured {predicted / step:.3f}",
    ]
    return "\n".join(lines)


def measure_two_ranks(size: PresetName = "small", batch: int = 8, rounds: int = 7) -> dict[str, Any]:
    """Milliseconds of the parts and of the whole, the slower rank's in the fastest round; JSON-ready.

    The fastest one, since whatever else runs on the machine can only add to a time.

    Args:
        size:   preset of the model.
        batch:  images a rank.
        rounds: in each, one step without communication, one all-reduce, one whole step.
    """
    receive, send = mp.get_context("spawn").Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:  # a file to meet in: no port that others could take
        mp.spawn(_rank, (f"file://{folder}/store", send, size, batch, rounds), nprocs=RANKS)
    about = dict(mode="replicate", preset=size, batch_per_rank=batch, rounds=rounds)
    return describe(torch.device("cpu")) | {"threads": 1} | about | receive.recv()


class Replica:
    """A model whose gradients are views of one flat buffer."""

    def __init__(self, config: ModelConfig, batch: int) -> None:
        torch.manual_seed(0)
        self.model = LMIM(config).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.flat = torch.zeros(sum(parameter.numel() for parameter in trained))
        views = self.flat.split([parameter.numel() for parameter in trained])
        for parameter, view in zip(trained, views, strict=True):
            parameter.grad = view.view_as(parameter)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        height, width = config.image_size
        self.images, self.guidance = (torch.rand(batch, 3, height, width) * 2 - 1 for _ in range(2))

    def step(self, reduce: bool) -> None:
        """Forward, backward, perhaps the all-reduce, update."""
        self.flat.zero_()
        self.model(self.images, self.guidance).loss.backward()
        if reduce:
            self.all_reduce()
        self.optimizer.step()

    def all_reduce(self) -> None:
        """The mean of the gradients over the ranks."""
        dist.all_reduce(self.flat)
        self.flat /= RANKS


def _rank(rank: int, meeting: str, send: Connection, size: PresetName, batch: int, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", meeting, rank=rank, world_size=RANKS)
    replica = Replica(preset(size, decoder_dropout=0.0), batch)
    works: tuple[Callable[[], None], ...] = (
        lambda: replica.step(reduce=False),
        replica.all_reduce,
        lambda: replica.step(reduce=True),
    )
    found = torch.zeros(rounds, len(works), dtype=torch.float64)
    for work in works:  # warm-up
        work()
    for row in found:
        for column, work in enumerate(works):
            dist.barrier()
            start = time.perf_counter()
            work()
            row[column] = time.perf_counter() - start
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if rank == 0:
        raw = dict(zip(_PARTS, (1e3 * found.T).tolist(), strict=True))
        fastest = {part: min(times) for part, times in raw.items()}
        send.send(fastest | {"gradient_bytes": FP32 * replica.flat.numel(), "raw": raw})
    dist.barrier()  # none leaves while the other still needs it
    dist.destroy_process_group()
