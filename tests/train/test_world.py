"""Processes that train together: real ones on gloo."""

import contextlib
import dataclasses
import json
import os
import re

import pytest
import torch
from ranks import run_ranks

from lmim_fast import cli
from lmim_fast.errors import DataError, LmimError, UsageError, is_shared
from lmim_fast.process import Process
from lmim_fast.train import world as worlds


def _talk(world):
    values = torch.tensor([1.0, 2.0]) * (world.rank + 1)
    world.mean_(values)
    return values.tolist(), world.largest(10 * world.rank, 1), world.gather(f"rank {world.rank}")


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


def _fail_when_the_peer_is_gone(world):
    if world.rank == 1:
        return None
    summed = None
    try:
        with worlds.answered():
            torch.distributed.all_reduce(torch.ones(3))
    except LmimError as error:
        summed = str(error)
    try:
        with world.together():
            raise LmimError("disk full")
    except LmimError as error:
        return summed, str(error), str(error.__cause__)


def test_a_collective_whose_peer_is_gone_names_it_and_an_own_failure_is_raised_all_the_same():
    summed, message, cause = run_ranks(_fail_when_the_peer_is_gone)[0]
    gone = r"rank 1, process \d+ on \S+, has ended: its output says more; the same command continues the run"
    assert re.match(gone, summed)
    assert message == "disk full"
    assert re.match(gone, cause)
    with pytest.raises(RuntimeError, match="sizes differ"), worlds.answered():
        raise RuntimeError("sizes differ")


def _talk_of_all(world):
    return {
        "talk": _talk(world),
        "fail on 0": _fail(world, DataError, on=0),
        "fail on 1": _fail(world, DataError, on=1),
        "unexpected": _fail(world, KeyError, on=1),
        "agreed": _agree(world),
    }


def _agree(world):
    with world.together(world.rank, 5 - world.rank) as agreed:
        pass
    return agreed


@pytest.fixture(scope="module")
def ranks():
    """What two real processes answered, rank 0 first."""
    return run_ranks(_talk_of_all)


def test_ranks_average_agree_and_gather(ranks):
    assert ranks[0]["talk"] == ranks[1]["talk"] == ([1.5, 3.0], [10, 1], ["rank 0", "rank 1"])


@pytest.mark.parametrize("on", [0, 1])
def test_a_failure_on_one_rank_is_raised_on_all_and_nobody_waits(ranks, on):
    assert ranks[on][f"fail on {on}"] == ("DataError", "record 7 is broken", "still talking", True)
    told = ("LmimError", f"record 7 is broken (rank {on})", "still talking", True)
    assert ranks[1 - on][f"fail on {on}"] == told


def test_an_unexpected_failure_is_told_to_the_peers_with_its_type(ranks):
    assert ranks[0]["unexpected"][:2] == ("LmimError", "KeyError: 'record 7 is broken' (rank 1)")
    assert ranks[1]["unexpected"][0] == "KeyError"


def test_a_block_of_all_ranks_agrees_on_values_by_the_same_message(ranks):
    assert [rank["agreed"] for rank in ranks] == [[1, 5]] * 2


def set_environment(monkeypatch, **variables):
    """What says which process this is, and nothing else that does."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set: start several processes by torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE 1, so there is no such rank"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', which is no number"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, "RANK is 2 and WORLD_SIZE 2, so there is no such rank"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "but MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "x"}, "MASTER_PORT is 'x', which is no"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first', which is no number"),
    ],
)
def test_variables_of_another_shell_are_named_with_what_to_unset(monkeypatch, variables, told):
    set_environment(monkeypatch, **variables)
    with pytest.raises(UsageError) as raised, worlds.join("cpu"):
        pass
    assert told in str(raised.value)
    assert "unset RANK WORLD_SIZE" in str(raised.value)


def test_ranks_that_do_not_come_are_named(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    set_environment(monkeypatch, RANK=0, WORLD_SIZE=3, MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(LmimError, match=r"^rank 1, 2 of 3 did not come within 1 seconds"):
        worlds.join("cpu", timeout=1).__enter__()


def test_a_group_of_gpu_and_cpu_ranks_is_refused_before_it_is_made(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    set_environment(monkeypatch, RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    peer = torch.distributed.PrefixStore("lmim", store)
    told = {"WORLD_SIZE": 2, "device": "cuda"}
    peer.set("process 1", json.dumps([told, dataclasses.asdict(Process.this())]))
    peer.set("read 1", "")
    with pytest.raises(UsageError, match="rank 1 differs from rank 0: device is 'cpu', there 'cuda'; start"):
        worlds.join("cpu", timeout=5).__enter__()


def test_a_single_process_needs_no_process_group(monkeypatch):
    set_environment(monkeypatch)
    with worlds.join("cpu") as world:
        assert not torch.distributed.is_initialized()
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert (world.gather(3), world.largest(4)) == ([3], [4])
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
    place = {"RANK": 2 + local_rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 2}
    set_environment(monkeypatch, **place, MASTER_ADDR="node0", MASTER_PORT=29500)
    with pytest.raises(UsageError, match="2 processes on this machine, but 1 visible GPUs") as raised:
        worlds.join("auto").__enter__()
    assert is_shared(raised.value) == (local_rank == 1)


def test_restarts_under_torchrun_warn_about_the_shared_store(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    with pytest.warns(UserWarning, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        worlds._warn_about_restarts()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("fails", [False, True])
def test_groups_are_left_alone_only_after_a_failure_on_nccl(monkeypatch, device, fails):
    # Its end waits for collectives that the peers will never join.
    ended = []
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *parts, **more: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(1))
    monkeypatch.setattr(
        worlds, "_device", lambda *parts: torch.device(device, 0 if device == "cuda" else None)
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    monkeypatch.setattr(worlds, "meet", lambda *parts: (None, []))
    set_environment(
        monkeypatch, RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500
    )
    with contextlib.suppress(LmimError), worlds.join():
        if fails:
            raise LmimError("disk full")
    assert ended == ([] if fails and device == "cuda" else [1])


@pytest.mark.parametrize(
    ("failure", "code"), [(LmimError("disk full"), 1), (KeyError("a bug"), 1), (KeyboardInterrupt(), 130)]
)
def test_a_process_whose_groups_were_left_says_why_and_ends_at_once(monkeypatch, capsys, failure, code):
    def fail(arguments):
        raise failure

    codes = []
    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr(worlds, "is_stuck", lambda: True)
    monkeypatch.setattr(os, "_exit", codes.append)
    cli.main(["pretrain"])
    assert codes == [code]
    if not isinstance(failure, KeyboardInterrupt):
        assert str(failure.args[0]) in capsys.readouterr().err
