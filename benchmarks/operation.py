"""One operation that is timed: its sizes, inputs, forms and limits; the kernels that a call launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import floors
from lmim_fast.kernels import runtime

Result = Tensor | tuple[Tensor, ...]
DIRECTIONS = ("forward", "forward+backward")
_LETTERS = {"batch": "B", "tokens": "N", "memory": "M"}
_IMPLIED = ("model", "width", "heads", "hidden")


@dataclass(frozen=True)
class Operation:
    """What is timed.

    sizes:  JSON-ready; holds `model`, `batch`, `tokens` and `p`, the dropout probability.
    inputs: random inputs for a device and a dtype; floating ones require gradients.
    plain:  the same in plain PyTorch, on the same inputs; compiled too.
    ours:   our forms by name, each taking `seed` by keyword; checked before they are timed.
    others: other people's forms by name; they raise `Unavailable`, or a RuntimeError, where they cannot run.
            The variant "compiled NAME" is one of them under torch.compile.
    passes: floors, from the bytes of an element and whether a backward pass follows.
    leading: compiled on a CPU too.
    directions: that are timed.
    """

    name: str
    sizes: dict[str, Any]
    inputs: Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]
    plain: Callable[..., Result]
    ours: Mapping[str, Callable[..., Result]]
    passes: Callable[[int, bool], floors.Passes]
    others: Mapping[str, Callable[..., Result]] = field(default_factory=dict)
    leading: bool = False
    directions: Sequence[str] = DIRECTIONS

    def __str__(self) -> str:
        """What tells it from the others, in words for pytest's -k; the model implies widths and heads."""
        shown = {name: value for name, value in self.sizes.items() if name not in _IMPLIED}
        if shown.get("memory") == shown["tokens"]:
            del shown["memory"]
        if not shown["p"]:
            del shown["p"]
        words = (f"{_LETTERS.get(name, name)}{value}" for name, value in shown.items())
        return " ".join([self.name, self.sizes["model"], *words])


class Unavailable(Exception):
    """This machine cannot run the variant; the message says why."""


def kernel_name(kernel: Any) -> str:
    """`module.function` of a function under `triton.jit`, compiled or interpreted."""
    function = kernel.fn
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


@contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the kernels that are launched inside, in order."""
    names: list[str] = []
    launch = runtime.launch

    def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.append(kernel_name(kernel))
        launch(kernel, *arguments, **options)

    with mock.patch.object(runtime, "launch", counted):
        yield names
