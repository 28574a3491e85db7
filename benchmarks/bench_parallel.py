"""A step of two processes on this machine, by the way in which they share the model.

    python -m benchmarks.bench_parallel [--preset small] [--batch 8] [--rounds 7] [--results FILE]

gloo, one thread a process; forms take turns in every round. "alone" is a step without communication, by
both processes at the same time; DDP is PyTorch's DistributedDataParallel, without our flat buffer. Memory is
that of weights, gradients, their buffer and the moments in one process, counted from the tensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import describe
from benchmarks.tables_parallel import parallel as render
from lmim_fast.config import PretrainConfig, preset
from lmim_fast.data.batch import Batch
from lmim_fast.train import optim
from lmim_fast.train import parallel as parallelism
from lmim_fast.train.gradients import FlatGradients, LocalGradients
from lmim_fast.train.step import TrainStep
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World

RANKS = 2
FORMS = ("alone", "DDP", "replicate", "shard", "shard, reshard")


class _Ddp:
    """Gradients by DistributedDataParallel's hooks, in one pass a step."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self._world = DistributedDataParallel(model, gradient_as_bucket_view=True), world

    def collect(self, last: bool) -> None:
        """Nothing: every pass is the last one."""

    def average_(self, losses: Tensor) -> None:
        """The losses; gradients are averaged by now."""
        self._world.mean_(losses)


class Form:
    """A model and its step in one of `FORMS`."""

    def __init__(self, name: str, config: PretrainConfig, world: World) -> None:
        mode: Literal["shard", "replicate"] = "shard" if name.startswith("shard") else "replicate"
        task = make_task(dataclasses.replace(config, parallel=mode, reshard="reshard" in name))
        self._model = task.build().train()
        parallelism.apply(self._model, task.config, world)
        self._optimizer = optim.make_optimizer(task.parameter_groups(self._model), config.optim)
        self._step = TrainStep(self._model, self._optimizer, task, world)
        if name == "alone":
            self._step._gradients = LocalGradients()
        if name == "DDP":
            ddp = _Ddp(self._model, world)
            self._step._model, self._step._gradients = ddp.model, ddp

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        self._step(0, iter([batch]), 1e-4)

    def bytes(self) -> int:
        """What this process keeps of the trained weights, with as much for gradients, and their buffer."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        moments = [t for state in self._optimizer.state.values() for t in state.values()]
        size = 2 * _bytes(trained) + _bytes(moments)
        gradients = self._step._gradients
        return size + (_bytes(gradients._buffers.values()) if isinstance(gradients, FlatGradients) else 0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def _rank(rank: int, meeting: str, send: Connection, config: PretrainConfig, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", meeting, rank=rank, world_size=RANKS)
    world = World(rank, RANKS, torch.device("cpu"), dist.new_group(backend="gloo"), RANKS)
    forms = {name: Form(name, config, world) for name in FORMS}
    batch = Batch.blank(config.batch_size // RANKS, config.model.image_size, world.device, guided=True)
    for tensor in (batch.plain, batch.warped):
        assert tensor is not None
        tensor.random_(0, 256)
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for number in range(rounds + 1):
        for name, form in forms.items():
            dist.barrier()
            start = time.perf_counter()
            form.step(batch)
            if number:  # the first is a warm-up
                times[name].append(1e3 * (time.perf_counter() - start))
    rows = [
        dict(form=name, milliseconds=times[name], bytes_per_rank=form.bytes()) for name, form in forms.items()
    ]
    if rank == 0:
        send.send(rows)
    dist.barrier()  # none leaves while the other still needs it
    dist.destroy_process_group()


def measure(size: Literal["tiny", "small", "base"], batch: int, rounds: int) -> dict[str, Any]:
    """Rank 0's times of every round, and the bytes that it keeps, by form; JSON-ready."""
    model = preset(size, decoder_dropout=0.0)
    config = PretrainConfig(data=("none",), teacher="random", model=model, batch_size=batch, precision="fp32")
    receive, send = mp.get_context("spawn").Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (f"file://{folder}/store", send, config, rounds), nprocs=RANKS)
    about = dict(benchmark="parallel", preset=size, batch=batch, ranks=RANKS)
    return describe(torch.device("cpu")) | {"threads": 1} | about | {"rows": receive.recv()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small", choices=("tiny", "small", "base"))
    parser.add_argument("--batch", type=int, default=8, help="images a step, over both processes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", help="write the result there")
    args = parser.parse_args(argv)
    result = measure(args.preset, args.batch, args.rounds)
    print(render(result))
    if args.results:
        Path(args.results).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
