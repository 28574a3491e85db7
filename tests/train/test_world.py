"""Real processes on gloo; each test starts its own."""

import multiprocessing
import os
import socket

import pytest
import torch

from lmim_fast.config import PretrainConfig
from lmim_fast.errors import DataError, LmimError, UsageError, is_shared
from lmim_fast.train import parallel
from lmim_fast.train import world as worlds


def _talk(world):
    values = torch.tensor([1.0, 2.0]) * (world.rank + 1)
    world.mean_(values)
    return values.tolist(), world.largest(10 * world.rank), world.gather(f"rank {world.rank}")


def _fail(world, kind, on):
    try:
        with world.together():
            if world.rank == on:
                raise kind("record 7 is broken")
        return "fine"
    except Exception as error:
        with world.together():
            said = "still talking"
        return type(error).__name__, str(error), said, is_shared(error)


def _average_gradients(world):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False)
    wrapped = parallel.wrap(model, PretrainConfig(data=("x",)), world)
    images = torch.tensor([[1.0, 0.0]]) if world.rank == 0 else torch.tensor([[0.0, 4.0]])
    with parallel.gradient_sync(wrapped, enabled=False):
        wrapped(images).sum().backward()
    local = model.weight.grad.tolist()
    with parallel.gradient_sync(wrapped, enabled=True):
        wrapped(images).sum().backward()
    return local, model.weight.grad.tolist()


def _worker(rank, port, results):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with worlds.join("cpu") as world:
        found = {
            "talk": _talk(world),
            "fail on 0": _fail(world, DataError, on=0),
            "fail on 1": _fail(world, DataError, on=1),
            "unexpected": _fail(world, KeyError, on=1),
            "gradients": _average_gradients(world),
        }
    results.put((rank, found, torch.distributed.is_initialized()))


@pytest.fixture(scope="module")
def ranks():
    """What two real processes found, rank 0 first."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.SimpleQueue()
    processes = [context.Process(target=_worker, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    found = sorted(results.get() for _ in processes)
    assert [still_initialized for _, _, still_initialized in found] == [False, False]
    return [answers for _, answers, _ in found]


def test_ranks_average_agree_and_gather(ranks):
    assert ranks[0]["talk"] == ranks[1]["talk"] == ([1.5, 3.0], 10, ["rank 0", "rank 1"])


@pytest.mark.parametrize("on", [0, 1])
def test_a_failure_on_one_rank_is_raised_on_all_and_nobody_waits(ranks, on):
    assert ranks[on][f"fail on {on}"] == ("DataError", "record 7 is broken", "still talking", True)
    told = ("LmimError", f"record 7 is broken (rank {on})", "still talking", True)
    assert ranks[1 - on][f"fail on {on}"] == told


def test_an_unexpected_failure_is_told_to_the_peers_with_its_type(ranks):
    assert ranks[0]["unexpected"][:2] == ("LmimError", "KeyError: 'record 7 is broken' (rank 1)")
    assert ranks[1]["unexpected"][0] == "KeyError"


def test_gradients_are_averaged_on_the_last_pass_only(ranks):
    assert [rank["gradients"][0] for rank in ranks] == [[[1.0, 0.0]], [[0.0, 4.0]]]
    assert [rank["gradients"][1] for rank in ranks] == [[[1.0, 4.0]]] * 2  # two passes, mean over the ranks


def test_a_single_process_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with worlds.join("cpu") as world:
        assert not torch.distributed.is_initialized()
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert (world.gather(3), world.largest(4)) == ([3], 4)
        with pytest.raises(LmimError, match="no") as caught, world.together():
            raise LmimError("no")
        assert not is_shared(caught.value)
        with pytest.raises(StopIteration), world.together():  # as from `next` of an iterator that has ended
            raise StopIteration


def test_cuda_that_is_not_there_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda"), worlds.join("cuda"):
        pass


@pytest.mark.parametrize("local_rank", [0, 1])
def test_too_few_gpus_fail_every_process_alike_and_the_first_of_the_machine_tells(monkeypatch, local_rank):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    # The second machine of two: its ranks are 2 and 3.
    for name, value in (("RANK", 2 + local_rank), ("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UsageError, match="2 processes on this machine, but 1 visible GPUs") as raised:
        worlds.join("auto").__enter__()
    assert is_shared(raised.value) == (local_rank == 1)


def test_restarts_under_torchrun_warn_about_the_shared_store(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    with pytest.warns(UserWarning, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        worlds._warn_about_restarts()
