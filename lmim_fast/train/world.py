"""Processes that train together."""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmim_fast.errors import LmimError, UsageError, shared

# Long enough for a slow checkpoint or a cold data disk, short enough that a hung rank is noticed.
_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process and its peers."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """gloo group for messages between hosts; None in a world of one. It never waits for the GPU."""

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and talks to the user."""
        return self.rank == 0

    def mean_(self, values: Tensor) -> None:
        """Replace `values`, in place and on the device, by their mean over the ranks."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size

    def largest(self, value: int) -> int:
        """The largest `value` that any rank has; every rank gets the same answer."""
        if self.control is None:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank (small host objects only)."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that every rank runs: if it fails on one, every rank raises and none waits for ever.

        A block ends on no rank before all have reached its end. What only one rank has to do is
        `with world.together():` around `if world.is_main:`.

        Raises:
            LmimError: on the ranks where the block did not fail, with the message of the one where it did.
                Marked as `shared`, as the failure itself is: rank 0 reports it.
        """
        if self.control is None:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # the peers hear of it first, it is raised again below
            failure = error
        if self.largest(0 if failure is None else 1) == 0:
            return
        messages = self.gather(None if failure is None else _message(failure))
        if failure is not None:
            raise shared(failure)
        rank, message = next((rank, text) for rank, text in enumerate(messages) if text is not None)
        raise shared(LmimError(f"{message} (rank {rank})"))


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
def join(device: str = "auto") -> Iterator[World]:
    """This process's `World`; under torchrun with several processes also their process groups.

    Args:
        device: "auto", "cpu" or "cuda"; a CUDA process takes the GPU of its local rank.
    Raises:
        UsageError: CUDA is asked for and not there, or there are fewer GPUs than local processes.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        place = _device(device, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)))
    except UsageError as error:
        if local_rank > 0:  # the first of each machine reports it: rank 0 may be on a healthy one
            shared(error)
        raise
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    if rank == 0:
        _warn_about_restarts()
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT, device_id=place if place.type == "cuda" else None)
    try:
        yield World(rank, size, place, dist.new_group(backend="gloo", timeout=_TIMEOUT))
    finally:
        dist.destroy_process_group()
