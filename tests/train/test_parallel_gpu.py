"""Sharding and captured collectives on one GPU: a process group of one, on NCCL."""

import socket

import pytest
import torch
import torch.distributed as dist
from parallel_runs import batch_of, config_of

from lmim_fast.train import optim, parallel
from lmim_fast.train.gradients import FlatGradients
from lmim_fast.train.step import TrainStep
from lmim_fast.train.tasks import make_task
from lmim_fast.train.world import World, join

pytestmark = pytest.mark.gpu
STEPS = 6


@pytest.fixture
def world(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    with join("cuda", grouped=True) as alone:
        yield alone


class _Reducing(World):
    """A world of one whose means are collectives all the same."""

    def mean_(self, values):
        dist.all_reduce(values, dist.ReduceOp.AVG)


def on_device(number, world):
    batch = batch_of(number, 0, World(0, 1, torch.device("cpu")), 1)
    return batch.with_tensors([tensor.to(world.device) for tensor in batch.tensors()])


def curve(world, config, *, flat=False):
    task = make_task(config)
    model = task.build().train()
    parallel.apply(model, config, world)
    graphed = world.device if config.cuda_graph == "on" else None
    optimizer = optim.make_optimizer(task.parameter_groups(model), config.optim, graphed=graphed)
    step = TrainStep(model, optimizer, task, world)
    if flat:
        step._gradients = FlatGradients(model, _Reducing(**vars(world)))
    if graphed is not None:
        step.capture_graph()
    rows = []
    for number in range(STEPS):
        batch = on_device(number, world)
        rows.append(step(number, iter([batch]), lr=1e-3))
    return torch.stack(rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_all_reduce_in_the_captured_graph_gives_the_eager_steps(world, precision):
    eager = curve(world, config_of(precision=precision), flat=True)
    graphed = curve(world, config_of(precision=precision, cuda_graph="on"), flat=True)
    torch.testing.assert_close(graphed, eager, rtol=0, atol=0)
    torch.testing.assert_close(eager, curve(world, config_of(precision=precision)), rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_fsdp_on_one_gpu_trains_as_the_plain_model(world, precision, tolerance):
    plain = curve(world, config_of(precision=precision))
    for changes in ({}, dict(reshard=True), dict(activation_checkpointing=True)):
        sharded = curve(world, config_of(precision=precision, parallel="shard", **changes))
        torch.testing.assert_close(sharded[:, 0], plain[:, 0], rtol=tolerance, atol=0)


def test_a_sharded_step_never_waits_for_the_device(world):
    config = config_of(precision="bf16", parallel="shard")
    task = make_task(config)
    model = task.build().train()
    parallel.apply(model, config, world)
    optimizer = optim.make_optimizer(task.parameter_groups(model), config.optim)
    step = TrainStep(model, optimizer, task, world)
    batches = [on_device(number, world) for number in range(4)]
    for number in range(2):
        step(number, iter([batches[number]]), lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (2, 3):
            step(number, iter([batches[number]]), lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
