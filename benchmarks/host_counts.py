"""What a step of `host_step.py` asks for: kernels, operators, and the Python frames on the way to a kernel.

Nothing here is timed. Operators are counted by PyTorch's profiler: under a dispatch mode our ops would take
another way to their kernels.
"""

from __future__ import annotations

import bisect
import functools
import sys
from collections import Counter, defaultdict
from types import FrameType
from typing import Any
from unittest import mock

import torch

from benchmarks.host_step import COUNTED, FORMS, PARTS, Form, Precision, config
from benchmarks.operation import kernel_name
from lmim_fast.config import ModelConfig
from lmim_fast.kernels import runtime
from lmim_fast.layers.block import PackedBlock

# They allocate or rename memory and no schema tells.
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
_MARK = "host_counts: "


@functools.cache
def launching(name: str) -> bool:
    """Whether an operator of PyTorch's launches on a GPU: no view, no empty memory, not made of others."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or name in _NO_KERNEL:
        return False
    func = getattr(packet, packet.overloads()[0])
    aliases = [returned.alias_info for returned in func._schema.returns]
    if any(alias is not None and not alias.is_write for alias in aliases):
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def operators(form: Form) -> dict[str, dict[str, int]]:
    """Operators of a step by part, by PyTorch's profiler: those launching a kernel on a GPU, others.

    Those inside a launching one are how a CPU does it, and do not count.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:

        def mark(part: str) -> None:
            with torch.profiler.record_function(_MARK + part):
                pass

        form.step(mark)
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    counted = {part: {"launching": 0, "others": 0} for part in PARTS}
    ends = [event.time_range.start for event in events if event.name.startswith(_MARK)]
    for event in events:
        number = bisect.bisect(ends, event.time_range.start) - 1  # the first mark is the start
        if event.name.startswith("aten::") and 0 <= number < len(PARTS) and not _inside(event):
            kind = "launching" if launching(event.name.removeprefix("aten::")) else "others"
            counted[PARTS[number]][kind] += 1
    return counted


def _inside(event: Any) -> bool:
    """Whether an operator is called by one that launches."""
    parent = event.cpu_parent
    while parent is not None:
        if launching(parent.name.removeprefix("aten::")):
            return True
        parent = parent.cpu_parent
    return False


def launches(form: Form) -> dict[str, dict[str, int]]:
    """Kernels of ours in a step: by part, and in each by name."""
    return {
        part: dict(sorted(Counter(kernel_name(launch.kernel) for launch in found).items()))
        for part, found in form.step().items()
    }


def hops(form: Form) -> dict[str, list[int]]:
    """Fewest and most Python frames between a block's forward and `runtime.launch`, by kernel.

    Raises:
        RuntimeError: no block launches a kernel through `runtime.launch`.
    """
    found: dict[str, list[int]] = defaultdict(list)
    launch = runtime.launch

    def counting(kernel: Any, *arguments: Any, **options: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        between = 0
        while frame is not None and frame.f_code is not PackedBlock.forward.__code__:
            frame, between = frame.f_back, between + 1
        if frame is not None:
            found[kernel_name(kernel)].append(between)
        launch(kernel, *arguments, **options)

    with mock.patch.object(runtime, "launch", counting):
        form.step()
    if not found:
        raise RuntimeError("no block launched a kernel through runtime.launch")
    return {name: [min(counts), max(counts)] for name, counts in sorted(found.items())}


def measure(precision: Precision, model: ModelConfig | None = None) -> dict[str, Any]:
    """All counts of a step at `COUNTED`, JSON-ready; a step before them makes the optimiser's state."""
    forms = {name: Form(name, precision, model or config(COUNTED)) for name in FORMS}
    for form in forms.values():
        form.step()
    return {
        "launches": launches(forms["ours"]),
        "operators": {name: operators(form) for name, form in forms.items()},
        "hops": hops(forms["ours"]),
    }
