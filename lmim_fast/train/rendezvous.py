"""How the processes of a run find each other: what the environment says of them, and their store."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from lmim_fast.errors import LmimError, UsageError
from lmim_fast.process import Process
from lmim_fast.train.agreement import refuse_different

_START = (
    "start several processes by torchrun, which sets it; for one process "
    "`unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT` first"
)

_READ_WITHIN = 10.0  # seconds


def _number(variable: str, default: int | None) -> int:
    text = os.environ.get(variable)
    if not text and default is not None:
        return default
    if text is None or not text.strip().isdecimal():
        seen = "is not set" if not text else f"is {text!r}, which is no number"
        raise UsageError(f"{variable} {seen}: {_START}")
    return int(text)


def place_of_this_process() -> tuple[int, int, int, int]:
    """Rank, world size, rank on this machine and processes on it, as the environment says.

    Raises:
        UsageError: it says something that cannot be, for one because another shell has left a part of it.
    """
    size = _number("WORLD_SIZE", 1)
    if size < 1:
        raise UsageError(f"WORLD_SIZE is {size}: {_START}")
    rank = _number("RANK", 0 if size == 1 else None)
    if rank >= size:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE {size}, so there is no such rank: {_START}")
    if size > 1:
        for variable in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(variable):
                raise UsageError(f"WORLD_SIZE is {size}, but {variable} is not set: {_START}")
        port = _number("MASTER_PORT", None)
        if not 0 < port < 2**16:
            raise UsageError(f"MASTER_PORT is {port}, which is no port: {_START}")
    if size > torch.cuda.device_count() > 0 and "LOCAL_RANK" not in os.environ:
        # Without it every process of a machine would take its first GPU.
        raise UsageError(f"WORLD_SIZE is {size}, but LOCAL_RANK is not set: {_START}")
    local_rank = _number("LOCAL_RANK", 0)
    local_size = _number("LOCAL_WORLD_SIZE", local_rank + 1)
    return rank, size, local_rank, local_size


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends a process that waits for its peers at once: they are waited for outside of Python."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def meet(
    rank: int, size: int, timeout: float, backend: str, agreed: dict[str, Any]
) -> tuple[dist.Store, list[Process]]:
    """The store of the group, and who its ranks are.

    Args:
        agreed: what must be equal on all ranks; compared here, before anything that they do together.
    Raises:
        LmimError:  names the ranks that have not come, or says where the store was looked for.
        UsageError: ranks that were started differently, for one with GPUs and without.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    agreed = {"WORLD_SIZE": size, "device": "cuda" if backend == "nccl" else "cpu", **agreed}
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout)))
        store = dist.PrefixStore("lmim", store)
        store.set(f"process {rank}", json.dumps([agreed, dataclasses.asdict(Process.this())]))
        keys, until = [f"process {other}" for other in range(size)], time.monotonic() + timeout
        while not store.check(keys):
            if time.monotonic() > until:
                late = [other for other in range(size) if not store.check([keys[other]])]
                raise LmimError(
                    f"rank {', '.join(map(str, late[:8]))} of {size} did not come within {timeout:.0f} "
                    f"seconds: is it started, and can it reach {address}? Otherwise {_START}"
                )
            time.sleep(0.05)
        told = [json.loads(store.get(key)) for key in keys]
        try:
            refuse_different([values for values, _ in told])
        except UsageError:
            _wait_for_readers(store, rank, size)
            raise
        peers = [Process(**fields) for _, fields in told]
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, LmimError):
            raise
        first = str(error).splitlines()[0]
        raise LmimError(
            f"rank {rank} of {size} found no group at {address} (MASTER_ADDR:MASTER_PORT): {first}. {_START}"
        ) from error
    return store, peers


def _wait_for_readers(store: dist.Store, rank: int, size: int) -> None:
    """The store ends with rank 0: it waits for the others to read there why the run ends."""
    store.set(f"read {rank}", "")
    until = time.monotonic() + _READ_WITHIN
    while rank == 0 and time.monotonic() < until:
        if store.check([f"read {other}" for other in range(size)]):
            return
        time.sleep(0.02)
