"""A function of CUDA tensors captured once as a CUDA graph and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Captured(NamedTuple):
    """A function on fixed tensors: `replay` runs it again, into the same `output`."""

    replay: Callable[[], None]
    output: Tensor


def capture(function: Callable[[], Tensor], warmup: int) -> Captured:
    """Run `function` `warmup` times, so that what is made lazily exists, then capture one more run.

    A capture runs nothing: only the warm-up has effects. No other thread may wait for the whole device
    meanwhile: that ends the capture with an error.
    """
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(warmup):
            function()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # what it would free may call into CUDA, which ends a capture
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = function()
    finally:
        if collecting:
            gc.enable()
    return Captured(graph.replay, output)


class GraphedStep:
    """`step` as one CUDA graph: a call copies its arguments into fixed buffers and replays.

    Random numbers of torch's CUDA generator are fresh in each replay: they are those of the generator's seed
    and offset at the call.

    Args:
        step:           a function of tensors that reads nothing back to the host; it may update parameters.
                        An optimiser in it has to be made with `capturable=True`.
        example_inputs: CUDA tensors that fix shapes and dtypes; the warm-up runs on them.
        warmup:         runs before the capture. They are real: `step` must know that they are not training.
        capture:        what captures; another one may stand in for CUDA.
    Raises:
        ValueError: (on a call) a tensor of another shape or dtype.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        example_inputs: Sequence[Tensor],
        *,
        warmup: int = 3,
        capture: Callable[[Callable[[], Tensor], int], Captured] = capture,
    ) -> None:
        self._inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in example_inputs]
        self._captured = capture(lambda: step(*self._inputs), warmup)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result of a step on `inputs`, which may be on the host; a tensor of its own."""
        for number, (fixed, tensor) in enumerate(zip(self._inputs, inputs, strict=True)):
            if (fixed.shape, fixed.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"input {number} must be {fixed.dtype} {tuple(fixed.shape)} as captured, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
            fixed.copy_(tensor, non_blocking=True)
        self._captured.replay()
        return self._captured.output.clone()
