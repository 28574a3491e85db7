"""Steps of a small LMIM on drawn images, by every way in which processes share a model."""

import dataclasses

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lmim_fast.config import ModelConfig, OptimConfig, PretrainConfig
from lmim_fast.data.batch import Batch
from lmim_fast.train import optim, parallel
from lmim_fast.train.graph import Captured
from lmim_fast.train.step import TrainStep
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World

WORLD = World(0, 1, torch.device("cpu"))
MODEL = ModelConfig(
    **dict(width=32, depth=2, heads=2, decoder_width=32, decoder_depth=2, decoder_heads=2, decoder_ffn=64),
    mae_decoder_depth=1,
    decoder_dropout=0.0,
)
STEPS, IMAGES = 3, 8


def config_of(**changes):
    settings = dict(data=("x",), model=MODEL, batch_size=IMAGES, precision="fp32", cuda_graph="off")
    settings |= dict(teacher="random", parallel="replicate", optim=OptimConfig(clip_norm=1.0, ema_decay=0.9))
    return PretrainConfig(**settings | changes)


def batch_of(step, micro, world, accumulation):
    """The share of a rank in a batch that depends on the step alone."""
    make = torch.Generator().manual_seed(step)
    plain = torch.randint(0, 256, (IMAGES, 32, 128, 3), dtype=torch.uint8, generator=make)
    size = IMAGES // world.size // accumulation
    rows = slice((micro * world.size + world.rank) * size, (micro * world.size + world.rank + 1) * size)
    numbers = torch.arange(IMAGES)[rows] + 100 * step
    batch = Batch.blank(size, (32, 128), world.device, guided=True)
    return dataclasses.replace(
        batch, indices=numbers, epochs=numbers, plain=plain[rows], warped=plain[rows].flip(2)
    )


def replaying(function, warmup):
    """Stands in for CUDA's capture: a replay runs the function again, into the same output."""
    for _ in range(warmup):
        function()
    output = torch.full((4,), float("nan"))

    def replay():
        output.copy_(function())

    return Captured(replay, output)


def train(world, config, *, graphed=False, wrap=None, steps=STEPS, peak=None):
    """Rows of some steps, whole weights and averages after them, and how many weights this rank holds."""
    task = make_task(config)
    model = task.build().train()
    parallel.apply(model, config, world)
    optimizer = optim.make_optimizer(
        task.parameter_groups(model), config.optim, graphed=world.device if graphed else None
    )
    step = TrainStep(model, optimizer, task, world, capture=replaying)
    if wrap is not None:
        wrap(step)
    if graphed:
        step.capture_graph()
    rows = []
    for number in range(steps):
        batches = (
            batch_of(number, micro, world, config.accumulation) for micro in range(config.accumulation)
        )
        lr = 1e-3 * (number + 1)
        rows.append(step(number, batches, lr=lr if peak is None else min(lr, peak)))
    weights = trained(parallel.whole(model, task, world))
    with optim.averaged_weights(optimizer):
        averages = trained(parallel.whole(model, task, world))
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if p.requires_grad]
    held = sum(tensor.numel() for tensor in local)
    return torch.stack(rows).numpy(), weights, averages, held


def trained(model):
    return {name: p.detach().clone().numpy() for name, p in model.named_parameters() if p.requires_grad}


class Ddp:
    """Gradients by DistributedDataParallel, which the flat buffer takes the place of."""

    def __init__(self, step, world):
        self._wrapped, self._world = DistributedDataParallel(step._model, gradient_as_bucket_view=True), world
        step._model, step._gradients = self._wrapped, self

    def collect(self, last):
        self._wrapped.require_backward_grad_sync = last

    def average_(self, losses):
        self._world.mean_(losses)


def assert_equal(got, wanted):
    assert (got[0] == wanted[0]).all()
    for values, others in zip(got[1:3], wanted[1:3], strict=True):
        assert all((values[name] == other).all() for name, other in others.items())


def assert_close(got, wanted, loss=1e-5, weight=2e-4):
    assert got[0][:, :3] == pytest.approx(wanted[0][:, :3], rel=loss)
    for name, value in wanted[1].items():
        if name.endswith(("qkv.bias", "in_proj_bias")):
            continue  # the gradient of keys' biases is rounding alone, and Adam makes steps of it
        assert abs(got[1][name] - value).max() < weight, name
