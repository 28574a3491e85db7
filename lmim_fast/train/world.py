"""Processes that train together."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmim_fast.errors import LmimError, UsageError, shared
from lmim_fast.process import Process
from lmim_fast.train.rendezvous import interruptible, meet, place_of_this_process

TIMEOUT = 600.0
"""Seconds: long enough for a slow save or a cold data disk, short enough to notice a hung rank."""

_DEATH_SHOWS_WITHIN = 2.0  # seconds
_WORDS = {"ended": "ended", "stopped": "been stopped by a signal"}


@dataclass(frozen=True)
class World:
    """This process and its peers."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """gloo group for messages between hosts; None without process groups. It never waits for the GPU."""
    local_size: int = 1
    """Processes of this machine."""

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and talks to the user."""
        return self.rank == 0

    def mean_(self, values: Tensor) -> None:
        """Replace `values`, in place and on the device, by their mean over the ranks."""
        if self.size == 1:
            return
        if self.device.type == "cuda":
            dist.all_reduce(values, dist.ReduceOp.AVG)
        else:  # gloo knows no mean
            with _collective():
                dist.all_reduce(values)
            values /= self.size

    def largest(self, *values: int) -> list[int]:
        """The largest of each value that any rank has; every rank gets the same answer."""
        if self.control is None:
            return list(values)
        box = torch.tensor(values)
        with _collective():
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return [int(value) for value in box]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank (small host objects only)."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        with _collective():
            dist.all_gather_object(values, value, group=self.control)
        return values

    @contextlib.contextmanager
    def together(self, *values: int) -> Iterator[list[int]]:
        """A block that every rank runs: if it fails on one, every rank raises and none waits for ever.

        A block ends on no rank before all have reached its end. What only one rank has to do is
        `with world.together():` around `if world.is_main:`.

        Args:
            values: what the ranks agree on by the same message.
        Yields:
            A list that holds, after the block, the largest of each value that any rank had.
        Raises:
            LmimError: on the ranks where the block did not fail, with the message of the one where it did.
                Marked as `shared`, as the failure itself is: rank 0 reports it.
        """
        agreed: list[int] = []
        if self.control is None:
            agreed += values
            yield agreed
            return
        failure: Exception | None = None
        try:
            yield agreed
        except Exception as error:  # the peers hear of it first, it is raised again below
            failure = error
        try:
            failed, *largest = self.largest(0 if failure is None else 1, *values)
            messages = self.gather(None if failure is None else _message(failure)) if failed else []
        except LmimError as silence:
            if failure is not None:  # which may be why the peers are gone
                raise failure from silence
            raise
        agreed += largest
        if not failed:
            return
        if failure is not None:
            raise shared(failure)
        rank, message = next((rank, text) for rank, text in enumerate(messages) if text is not None)
        raise shared(LmimError(f"{message} (rank {rank})"))


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """A block with collectives: the error about a silent peer becomes one that names it, as far as is known.

    Raises:
        LmimError: a peer has ended or hangs.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise LmimError(f"{_missing()}; the same command continues the run ({reason})") from error


_peers: list[Process] = []  # of this group, by rank
_in_collective = 0


def waits_for_peers() -> bool:
    """Whether this process is in a collective of `World`: if it does not get on, a peer is why."""
    return _in_collective > 0


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    global _in_collective
    _in_collective += 1
    try:
        with answered():
            yield
    finally:
        _in_collective -= 1


def _missing() -> str:
    """The ranks that have ended or were stopped, as far as this machine can tell."""
    gone: list[str] = []
    until = time.monotonic() + _DEATH_SHOWS_WITHIN
    while not gone and time.monotonic() < until:  # its connections are closed before it has ended
        states = [(rank, peer, peer.state()) for rank, peer in enumerate(_peers)]
        gone = [
            f"rank {rank}, process {peer.pid} on {peer.host}, has {_WORDS[state]}"
            for rank, peer, state in states
            if state in _WORDS
        ]
        time.sleep(0.02)
    if gone:
        return "; ".join(gone) + ": its output says more"
    places: dict[str, list[int]] = {}
    for rank, peer in enumerate(_peers):
        places.setdefault(peer.host, []).append(rank)
    hosts = "; ".join(f"{host}: ranks {_range(ranks)}" for host, ranks in places.items())
    return (
        "another process of the run has ended or hangs, and none of this machine has ended: look for the "
        f"first error, or for a rank that `hangs` by its own output{f' ({hosts})' if hosts else ''}"
    )


def _range(ranks: list[int]) -> str:
    consecutive = ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 1
    return f"{ranks[0]}-{ranks[-1]}" if consecutive else ", ".join(map(str, ranks))


def _message(failure: Exception) -> str:
    """What the peers of a failed rank say about it."""
    return str(failure) if isinstance(failure, LmimError) else f"{type(failure).__name__}: {failure}"


def _device(name: str, local_rank: int, local_size: int) -> torch.device:
    """The device of one of the `local_size` processes of this machine; all of them fail, or none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available here; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_size > torch.cuda.device_count():
        raise UsageError(
            f"{local_size} processes on this machine, but {torch.cuda.device_count()} visible GPUs: "
            "lower --nproc-per-node or pass --device cpu"
        )
    return torch.device("cuda", local_rank)


def _warn_about_restarts() -> None:
    # Read by the torchrun agent, which has started by now: a worker can only warn.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts > 0 and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        warnings.warn(
            "torchrun restarts can hang: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun",
            stacklevel=2,
        )


@contextlib.contextmanager
def join(
    device: str = "auto",
    *,
    timeout: float = TIMEOUT,
    grouped: bool = False,
    agreed: dict[str, Any] | None = None,
) -> Iterator[World]:
    """This process's `World`; under torchrun with several processes also their process groups.

    Args:
        device:  "auto", "cpu" or "cuda"; a CUDA process takes the GPU of its local rank.
        timeout: seconds that ranks wait for each other before they fail.
        grouped: make process groups for a single process too, if torchrun has started it.
        agreed:  what must be equal on all ranks, as JSON has it.
    Raises:
        UsageError: CUDA is asked for and not there, there are fewer GPUs than local processes, or ranks
            differ in what must be equal.
    """
    rank, size, local_rank, local_size = place_of_this_process()
    try:
        place = _device(device, local_rank, local_size)
    except UsageError as error:
        if local_rank > 0:  # the first of each machine reports it: rank 0 may be on a healthy one
            shared(error)
        raise
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1 and not (grouped and "MASTER_ADDR" in os.environ):
        yield World(0, 1, place)
        return
    if rank == 0:
        _warn_about_restarts()
    backend, limit = "nccl" if place.type == "cuda" else "gloo", datetime.timedelta(seconds=timeout)
    with interruptible():
        store, _peers[:] = meet(rank, size, timeout, backend, agreed or {})
        where = place if place.type == "cuda" else None
        try:
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=where
            )
            control = dist.new_group(backend="gloo", timeout=limit)
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise LmimError(f"the ranks cannot reach each other: {str(error).splitlines()[0]}") from error
    try:
        yield World(rank, size, place, control, local_size)
    except BaseException:
        # NCCL waits at its end for collectives that the peers will never join: the process ends without it.
        if backend == "gloo":
            dist.destroy_process_group()
        raise
    finally:
        _peers.clear()
    dist.destroy_process_group()


def is_stuck() -> bool:
    """Whether this process left NCCL's groups as they were after a failure: an ordinary exit may hang."""
    return dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"
