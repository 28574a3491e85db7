"""What an out-of-memory error means: a snapshot of the allocator, and a batch that would fit."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lmim_fast.config import RunConfig
from lmim_fast.errors import LmimError
from lmim_fast.train.task import Task
from lmim_fast.train.world import World

Measure = Callable[[int], int]
"""Images of a pass to the peak bytes of its forward and backward pass, all that lives beside them included.

Raises:
    torch.OutOfMemoryError: they do not fit.
"""

_SPARE = 0.05  # of the device's memory: fragments, and what other libraries allocate
_NO_ROOM = (
    "not even one image a pass fits; pass --activation-checkpointing, or --parallel shard on several GPUs"
)


class _Unknown(Exception):
    """Why it cannot be said how many images fit."""


def explain_out_of_memory(
    error: torch.OutOfMemoryError,
    run: Path | None,
    task: Task,
    model: nn.Module,
    config: RunConfig,
    world: World,
    measure: Measure | None = None,
    limit: int | None = None,
) -> LmimError:
    """The error to raise in place of one in a training step.

    Writes RUN/memory-rank{rank}.pickle, which pytorch.org/memory_viz shows, frees the gradients, and measures
    passes of fewer images: a line through two of them says how many fit in the device's memory. There is no
    collective call in it: perhaps only this rank ran out of memory. Nothing that goes wrong here is raised:
    it is said. Training cannot go on afterwards.

    Args:
        run:     folder of the snapshot; None: none is written.
        model:   the module itself, without a wrapper that talks to other ranks.
        measure: another way to measure, for tests; None: CUDA's allocator.
        limit:   bytes that the device gives to this process; None: asks CUDA.
    Returns:
        An error whose message names the images of a pass and an option to pass.
    """
    images = config.batch_size // (config.accumulation * world.size)
    parts = [f"out of memory with {images} images a pass on {world.device}"]
    snapshot = None if run is None else _snapshot(run / f"memory-rank{world.rank}.pickle", world.device)
    traceback.clear_frames(error.__traceback__)  # they hold the activations
    try:
        fit = _images_that_fit(images, task, model, world, measure, limit)
    except _Unknown as reason:
        parts.append(f"how many fit could not be measured ({reason}); {_option(config, world, images // 2)}")
    else:
        parts.append(f"about {fit} fit; {_option(config, world, fit)}" if fit else _NO_ROOM)
    return LmimError("; ".join([": ".join(parts), *filter(None, [snapshot])]))


def _option(config: RunConfig, world: World, fit: int) -> str:
    """The fewest accumulation passes of at most `fit` images each, as an option."""
    share = config.batch_size // world.size
    counts = [count for count in range(config.accumulation + 1, share + 1) if share % count == 0]
    enough = [count for count in counts if share // count <= fit]
    if not enough:
        return _NO_ROOM
    graph = " --cuda-graph off" if config.cuda_graph == "on" else ""  # a graph is of one pass
    return f"pass --accumulation {enough[0]}{graph}, which trains the same in passes of {share // enough[0]}"


def _images_that_fit(
    images: int, task: Task, model: nn.Module, world: World, measure: Measure | None, limit: int | None
) -> int:
    """The most images of a pass that fit, fewer than `images`; 0: not even one."""
    if images == 1:
        return 0
    try:
        for parameter in model.parameters():
            parameter.grad = None
        gc.collect()
        if measure is None:
            if world.device.type != "cuda":
                raise _Unknown(f"{world.device} has no allocator to ask")
            if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
                raise _Unknown("the model is split over processes, which would have to run it together")
            measure = _measure_on_cuda(task, model, world.device)
        if limit is None:
            limit = _limit_of(world.device)
        return min(images - 1, _on_the_line(images, measure, int(limit * (1 - _SPARE))))
    except _Unknown:
        raise
    except Exception as problem:  # of whatever kind: the user is to hear of the first error
        raise _Unknown(f"{type(problem).__name__}: {problem}".splitlines()[0]) from problem


def _on_the_line(images: int, measure: Measure, limit: int) -> int:
    """Where a line through the peaks of two passes of fewer images reaches the limit; 0: below one image."""
    large = max(1, images // 2)
    while True:
        small = large // 2
        try:
            low = measure(small) if small else None
            high = measure(large)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            large //= 2
            if not large:
                return 0
            continue
        break
    if low is None:  # one image, and that runs
        return int(high <= limit)
    if high <= low:
        raise _Unknown(f"passes of {small} and {large} images took {low:,} and {high:,} bytes")
    slope = (high - low) / (large - small)
    return max(0, int((limit - low) / slope + small))


def _limit_of(device: torch.device) -> int:
    """Bytes that this process can have: what it holds, and what is free."""
    if device.type != "cuda":
        raise _Unknown(f"the memory of {device} is not known")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _measure_on_cuda(task: Task, model: nn.Module, device: torch.device) -> Measure:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def measure(images: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        losses = task.losses(model, task.blank_batch(images, device))
        # Not `backward`: hooks that wait for other ranks may be on the parameters' gradients.
        torch.autograd.grad(losses[0], parameters, allow_unused=True)
        return torch.cuda.max_memory_allocated(device)

    return measure


def _snapshot(path: Path, device: torch.device) -> str:
    """Write the allocator's snapshot; where it is, or why there is none."""
    if device.type != "cuda":
        return f"no memory snapshot: {device} has none"
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as problem:  # not worth hiding the explanation for
        return f"no memory snapshot: {type(problem).__name__}: {problem}"
    return f"memory snapshot in {path}"
