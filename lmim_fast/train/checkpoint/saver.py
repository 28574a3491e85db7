"""Saves that do not stop training: tensors are copied to the host, a thread of their own writes them.

What a save has to do, and where: `save` copies in the caller's thread, which is all that training waits for.
The thread then writes, hashes, publishes and applies retention. Whole: rank 0 alone. Sharded: all ranks; they
talk through a process group that nothing else uses, since two threads must not share one.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import Metadata, SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from lmim_fast import faults
from lmim_fast.train.checkpoint import content, folders
from lmim_fast.train.checkpoint.files import describe, explained
from lmim_fast.train.checkpoint.retention import retain
from lmim_fast.train.checkpoint.shards import ShardWriter
from lmim_fast.train.world import World

Layout = Literal["auto", "whole", "sharded"]
Files = dict[str, dict[str, Any]]
Result = TypeVar("Result")

SLOWEST = 1800.0
"""Seconds that a save may take: a disk may be slow, and the thread of a rank waits for the slowest one."""


class Saver:
    """Writes a run's checkpoints, one at a time, while training goes on; every rank has one.

    Args:
        run:        run folder.
        world:      the ranks; they make their savers together.
        keep:       newest checkpoints that stay on disk.
        keep_every: keep also the multiples of this many steps; 0: none.
        layout:     whole: safetensors files that rank 0 writes; sharded: a file a rank; auto: whole if rank 0
                    has host memory for twice the weights and moments, decided at the first save.
    """

    def __init__(
        self, run: Path, world: World, *, keep: int, keep_every: int = 0, layout: Layout = "auto"
    ) -> None:
        self._run, self._world, self._keep, self._keep_every = run, world, keep, keep_every
        self._layout: Layout = "whole" if layout == "auto" and world.size == 1 else layout
        self._group: dist.ProcessGroup | None = None
        if world.control is not None and self._layout != "whole":
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=SLOWEST))
        self._peers = dataclasses.replace(world, control=self._group)
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._published: list[Path] = []

    def save(self, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begin the checkpoint of `state["step"]`; all ranks call it at the same step.

        When it returns, weights and moments may change: what is written is what they were. A save still in
        flight is waited for.

        Args:
            state: what state.json says, ready for JSON; a number `score` in it ranks the checkpoint for
                retention, lower is better.
        Raises:
            LmimError: an earlier save failed, on this rank or another; this one has not begun.
        """
        with self._world.together():
            self.wait()
            faults.point("gather")
            model_tensors, moments = content.live_tensors(model, optimizer)
            live = {folders.MODEL_PREFIX + name: tensor for name, tensor in model_tensors.items()}
            live |= {folders.OPTIMIZER_PREFIX + name: tensor for name, tensor in moments.items()}
            choice = _choose_layout(live) if self._layout == "auto" else self._layout
        self._layout = self._world.gather(choice)[0]
        with self._world.together():
            self._make_room(live if self._writes else {})
        with self._world.together():
            ready = self._copy(live)
        if self._writes:
            job = (copy.deepcopy(state), live, ready)
            self._thread = threading.Thread(target=self._work, args=job, name="checkpoint", daemon=True)
            self._thread.start()

    @property
    def _sharded(self) -> bool:
        return self._layout == "sharded"

    @property
    def _writes(self) -> bool:
        return self._sharded or self._world.is_main

    @property
    def writing(self) -> bool:
        """Whether a save of this rank is in flight."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a save of this rank failed and nobody was told yet; cheap, for the ranks to agree on."""
        return self._failure is not None

    def check(self) -> None:
        """Raise the failure of a save, once; local and cheap, for every step.

        Raises:
            LmimError: the disk is full or cannot be written; checkpoints before and live weights are intact.
            Exception: whatever else went wrong in the thread.
        """
        if self._failure is None:
            return
        self._join()
        failure, self._failure = self._failure, None
        raise failure

    def wait(self) -> None:
        """Wait until nothing is in flight; raises what `check` does."""
        self._join()
        self.check()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def published(self) -> list[Path]:
        """Checkpoints that got their name since the last call; on ranks that write."""
        new = self._published[:]
        del self._published[: len(new)]  # the thread may have added one
        return new

    def close(self) -> None:
        """Wait for the save in flight and free the copies; raises what `check` does."""
        try:
            self.wait()
        finally:
            self._host.clear()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as failure:  # it must not hide why the block ended
            error.add_note(f"the checkpoint in flight was not saved either: {failure}")

    def _make_room(self, live: Mapping[str, Tensor]) -> None:
        """Host buffers of what this rank writes; those of the save before are used again."""
        room, pinned = {}, self._world.device.type == "cuda"
        for name, tensor in live.items():
            shape = _local(tensor).shape if self._sharded else tensor.shape
            old = self._host.get(name)
            if old is None or old.shape != shape or old.dtype != tensor.dtype:
                old = torch.empty(shape, dtype=tensor.dtype, pin_memory=pinned)
            room[name] = old
        self._host = room

    @torch.no_grad()
    def _copy(self, live: Mapping[str, Tensor]) -> torch.cuda.Event | None:
        """Copy to the host, in the order of the stream: what is launched later may change the tensors.

        Returns:
            what the thread has to wait for; None: the copies are done.
        """
        for name, tensor in live.items():
            # Every rank takes part in gathering, rank 0 keeps the result.
            part = _local(tensor) if self._sharded else _whole(tensor)
            if name in self._host:
                self._host[name].copy_(part, non_blocking=True)
        if self._world.device.type != "cuda":
            return None
        ready = torch.cuda.Event(blocking=True)  # the thread sleeps until then
        ready.record()
        return ready

    def _work(
        self, state: dict[str, Any], live: Mapping[str, Tensor], ready: torch.cuda.Event | None
    ) -> None:
        """The thread, from the copies to retention."""
        final = folders.folder_of(self._run, state["step"])
        try:
            if self._world.device.type == "cuda":
                torch.cuda.set_device(
                    self._world.device
                )  # of this thread; an event of another is not waited for
            if self._sharded:
                self._write_shards(final, state, live, ready)
            else:
                self._write_whole(final, state, ready)
        except Exception as failure:  # the caller hears of it at its next `check`
            self._failure = explained(failure, final)

    def _write_whole(self, final: Path, state: dict[str, Any], ready: torch.cuda.Event | None) -> None:
        with folders.writing(final) as temporary:
            if ready is not None:
                ready.synchronize()
            model, moments = folders.split(self._host)
            folders.commit(final, state, folders.write_whole(temporary, model, moments))
        self._published.append(final)
        self._retain()

    def _retain(self) -> None:
        retain(self._run, keep=self._keep, keep_every=self._keep_every)

    def _write_shards(
        self,
        final: Path,
        state: dict[str, Any],
        live: Mapping[str, Tensor],
        ready: torch.cuda.Event | None,
    ) -> None:
        rank, is_main = self._world.rank, self._world.is_main
        folder = folders.unfinished(final) / folders.SHARDS
        writer = ShardWriter(folder, live, self._host)

        def begin() -> SavePlan:
            if ready is not None:
                ready.synchronize()
            if is_main:
                folders.begin(final)
            return writer.propose()

        def write() -> tuple[list[WriteResult], Metadata, Files]:
            folder.mkdir(exist_ok=True)  # on every rank: hosts may see each other's folders late
            results, metadata, paths = writer.write(plans, rank)
            faults.point("save")
            return results, metadata, {f"{folders.SHARDS}/{path.name}": describe(path) for path in paths}

        def publish() -> None:
            if not is_main:
                return
            index = writer.finish(parts[0][1], [results for results, _, _ in parts])
            files = {f"{folders.SHARDS}/{index.name}": describe(index)}
            faults.point("save")
            for _, _, lines in parts:
                files |= lines
            folders.commit(final, {**state, "layout": "sharded"}, files)

        try:
            plans = self._together(final, begin)
            parts = self._together(final, write)
            self._together(final, publish)
        except Exception:
            if is_main:
                folders.discard(final)
            raise
        self._published.append(final)
        self._together(final, lambda: self._retain() if is_main else None)

    def _together(self, final: Path, work: Callable[[], Result]) -> list[Result]:
        """What `work` gave on every rank; if it fails on one, all raise."""
        with self._peers.together():
            try:
                result = work()
            except Exception as failure:
                told = explained(failure, final)
                if told is failure:
                    raise
                raise told from failure
        return self._peers.gather(result)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _choose_layout(live: Mapping[str, Tensor]) -> Layout:
    """Whole, unless the model is split and this host lacks room for twice its tensors: copy and all else."""
    if not any(isinstance(tensor, DTensor) for tensor in live.values()):
        return "whole"
    needed = 2 * sum(tensor.numel() * tensor.element_size() for tensor in live.values())
    return "whole" if needed <= _available_bytes() else "sharded"


def _available_bytes() -> int:
    """Host memory that this process may still take: of the machine and, in a container, of its limit."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used, parts = group / "memory.max", group / "memory.current", group / "memory.stat"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        sizes = dict(line.split() for line in parts.read_text().splitlines())
        cache = int(sizes["active_file"]) + int(sizes["inactive_file"])  # given back when it is needed
        available = min(available, int(text) - int(used.read_text()) + cache)
    return available
