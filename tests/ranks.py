"""Real processes on gloo for a test: one function, called with the `World` of each of them."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import warm
from torch.distributed import TCPStore

from lmim_fast.train import world as worlds


@dataclass
class _Failure:
    text: str


def run_ranks(
    function: Callable[..., Any], *arguments: Any, size: int = 2, grouped: bool = False
) -> list[Any]:
    """What `function(world, *arguments)` returns in `size` processes of one thread, rank 0 first."""
    # As under torchrun, the store is its parent's: a port that was only found free may be taken meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, ends = [], []
    for rank in range(size):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        settings = {**os.environ, **warm.place(rank, size, store.port)}
        process = warm.process(_work, settings, grouped, theirs, function, arguments)
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    answers = [_receive(end) for end in ends]
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    failures = [answer.text for answer in answers if isinstance(answer, _Failure)]
    assert not failures, "\n".join([*failures, f"exit codes {codes}"])
    return answers


def _receive(end: Connection) -> Any:
    try:
        return end.recv()
    except EOFError:
        return _Failure("a process ended without an answer")


def _work(
    settings: dict[str, str],
    grouped: bool,
    end: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(settings)
    torch.set_num_threads(1)
    answer: Any
    try:
        with worlds.join("cpu", timeout=60.0, grouped=grouped) as world:
            answer = function(world, *arguments)
    except BaseException:  # whatever it is, the test shows it
        answer = _Failure(f"rank {settings['RANK']}: {traceback.format_exc()}")
    end.send(answer)
