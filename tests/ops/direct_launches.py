"""Launches of real kernels through Triton's JIT and directly, told as JSON; for test_direct_launch.py.

A process of its own, since its kernels are Triton's and not the interpreter's. Real are the kernels,
compiled for sm_90, the JIT, and the compiled kernels that it returns. A stand-in is the driver with its
launcher, which notes what it is called with (`benchmarks/host_launch.py`); arguments are CPU tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction

from benchmarks.host_launch import Driver, clone, launches, without_device
from lmim_fast.kernels import direct, masking, norm, runtime


class Counted:
    """Runs of the JIT while it is open."""

    def __init__(self) -> None:
        self.runs = 0

    @contextmanager
    def opened(self, run: Callable[..., Any] = JITFunction.run) -> Iterator[Counted]:
        """With `run` in the place of the JIT's."""

        def counting(kernel: Any, *arguments: Any, **options: Any) -> Any:
            self.runs += 1
            return run(kernel, *arguments, **options)

        with mock.patch.object(JITFunction, "run", counting):
            yield self


def launch(one: runtime.Launch, path: str) -> None:
    options = {name: value for name, value in one.options.items() if name != "enable_fp_fusion"}
    with runtime.launching(path), mock.patch.object(runtime, "_elsewhere", return_value=None):
        runtime.launch(one.kernel, one.grid, *one.arguments, **options, **one.constants)


def described(value: Any) -> Any:
    return [str(value.dtype), value.data_ptr(), [*value.shape]] if isinstance(value, Tensor) else value


def variants() -> Iterator[runtime.Launch]:
    """Real launches, and some of norm's forward pass with other pointers, integers and absent tensors."""
    yield from launches()
    memory = torch.zeros(4, 65)
    x, parameter = memory[:, 1:], torch.zeros(64)
    for branch, residual in ((None, memory[:, :64]), (x, x), (None, x)):
        with runtime.recording((9, 0)) as recording:
            norm.forward(branch, None, residual, parameter, parameter, None, 0, torch.float32, 1e-6)
        yield recording.launches[0]
    for number in (1, 16, 2**33):  # of rows: they are not read
        arguments = recording.launches[0].arguments
        yield recording.launches[0]._replace(arguments=(*arguments[:-2], number, arguments[-1]))


def same(noted: list[Any]) -> list[dict[str, Any]]:
    """Each variant through the JIT and twice directly, in this order, and once more after all of them."""
    ones = [clone(one) for one in variants()]
    kernels = {one.kernel.fn: one.kernel for one in ones}
    ones = [one._replace(kernel=kernels[one.kernel.fn]) for one in ones]  # a kernel has several forms
    results = []
    for one in ones:
        counts = []
        for path in ("triton", "direct", "direct"):
            with Counted().opened() as counted:
                launch(one, path)
            counts.append(counted.runs)
        results.append({"kernel": one.kernel.__name__, "runs": counts, "launched": noted[-3:]})
    for one, result in zip(ones, results, strict=True):
        with Counted().opened() as counted:
            launch(one, "direct")
        result["runs"].append(counted.runs)
        result["launched"] = result["launched"] + noted[-1:]
    return results


def moved(driver: Driver, noted: list[Any]) -> dict[str, Any]:
    """Streams of launches in a row, and runs of the JIT where the device changes."""
    one, runs = clone(launches()[0]), []
    for device, stream in ((0, 7), (0, 8), (0, 0), (1, 9), (1, 10), (0, 11)):
        driver.device, driver.stream = device, stream
        with Counted().opened() as counted:
            launch(one, "direct")
        runs.append(counted.runs)
    driver.device = driver.stream = 0
    return {"streams": [stream for _, stream, _ in noted[-6:]], "runs": runs}


def hooked() -> dict[str, list[Any]]:
    """What hooks of a profiler are told by a launch of either path, when they are set and after."""
    told: dict[str, list[Any]] = {}
    one = clone(launches()[0])
    for path in runtime.LAUNCHES:
        launch(one, path)
    for path in runtime.LAUNCHES:
        events = told[path] = []

        def enter(metadata: Any, events: list[Any] = events) -> None:
            events.append(["enter", metadata.get()["name"], metadata.get()["stream"]])

        def leave(metadata: Any, events: list[Any] = events) -> None:
            events.append(["exit", metadata.get()["name"], metadata.get()["stream"]])

        with Counted().opened() as counted:
            knobs.runtime.launch_enter_hook.add(enter)
            knobs.runtime.launch_exit_hook.add(leave)
            launch(one, path)
            knobs.runtime.launch_enter_hook.remove(enter)
            knobs.runtime.launch_exit_hook.remove(leave)
            launch(one, path)
        events.append(counted.runs)
    return told


def left_to_the_jit() -> dict[str, int]:
    """Runs of the JIT in two direct launches of what it has compiled, by what is set between."""
    one, counts = clone(launches()[0]), {}
    launch(one, "direct")
    kernel = one.kernel

    def twice(name: str) -> None:
        with Counted().opened(lambda *arguments, **options: None) as counted:
            launch(one, "direct")
            launch(one, "direct")
        counts[name] = counted.runs

    twice("nothing")
    kernel.add_pre_run_hook(lambda *arguments, **options: None)
    twice("a hook before the run")
    kernel.pre_run_hooks.clear()
    for owner, name in (
        (knobs.runtime, "debug"),
        (knobs.compilation, "instrumentation_mode"),
        (knobs.runtime, "add_stages_inspection_hook"),
        (kernel, "debug"),
    ):
        with mock.patch.object(owner, name, "set"):
            twice(f"{name} of {type(owner).__name__}")
    compiled = one
    for name, value in (("an integer of 64 bits without sign", 2**63), ("a tuple", (1, 2))):
        one = compiled._replace(arguments=(*compiled.arguments[:-1], value))
        twice(name)
    one = compiled
    twice("nothing again")
    one = clone(launches()[0])
    twice("a kernel that is still being compiled")
    return counts


def grown() -> dict[str, Any]:
    """Forms that are kept after steps with other seeds and epochs, and after too many other constants."""
    with runtime.recording((9, 0)) as recording:
        for step in range(40):
            masking.draw(step * 2**29 + 1, None, 16 * step, torch.arange(8), 16, 4, step % 2)
    cloned = clone(recording.launches[0])
    with Counted().opened() as steps:
        for one in recording.launches:
            launch(one._replace(kernel=cloned.kernel), "direct")
    known = direct._kernels[id(cloned.kernel)]
    forms = len(known.forms)
    compiled = next(iter(known.forms.values()))[0]
    most = 0
    with mock.patch.object(direct, "FORMS", 8), Counted().opened(lambda *a, **b: compiled) as others:
        for number in range(40):
            launch(cloned._replace(constants=cloned.constants | {"BLOCK": number}), "direct")
            most = max(most, len(known.forms))
    return {"steps": [steps.runs, forms], "constants": [others.runs, most]}


def main() -> dict[str, Any]:
    noted: list[Any] = []

    def note(launched: Any) -> None:
        grid, stream, arguments = launched
        noted.append([grid, stream, [described(value) for value in arguments]])

    with without_device(note) as driver:
        return {
            "same": same(noted),
            "moved": moved(driver, noted),
            "hooked": hooked(),
            "left to the JIT": left_to_the_jit(),
            "grown": grown(),
        }


if __name__ == "__main__":
    print(json.dumps(main()))
