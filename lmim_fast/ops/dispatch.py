"""Which form of an op runs, kernel or eager: one table for all ops.

An op checks its arguments and calls `run` with its eager form; a kernel is registered with the inputs it is
made for. `LMIM_FAST_BACKEND` (auto, eager or triton) and the `backend` context manager override the choice.
"auto" launches kernels on CUDA devices alone; in Triton's interpreter, on a CPU, they run where "triton" is
asked for by name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmim_fast.kernels import runtime

Result = TypeVar("Result")
BACKENDS = ("auto", "eager", "triton")


@dataclass(frozen=True)
class Kernel:
    """What to launch, for which dtypes, and a rule that says why an input does not fit.

    launch:  takes the arguments of the eager form.
    refuses: takes the same arguments; a reason, or None where the kernel fits.
    """

    launch: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...]
    refuses: Callable[..., str | None]


_kernels: dict[str, Kernel] = {}
_override: str | None = None


def register(op: str, kernel: Kernel) -> None:
    """Enter the kernel of `op` into the table; a second one for the same name is an error."""
    if op in _kernels:
        raise ValueError(f"op {op!r} has a kernel already")
    _kernels[op] = kernel


def current_backend() -> str:
    """The backend in force: of the innermost `backend` block, else of LMIM_FAST_BACKEND, else "auto"."""
    name = _override or os.environ.get("LMIM_FAST_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on backend `name`: "auto", "eager" or "triton"."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    global _override
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def run(op: str, eager: Callable[..., Result], *arguments: Any) -> Result:
    """Call the kernel of `op` where it fits these arguments, else its eager form, with the same arguments.

    Raises:
        RuntimeError: as `select`.
    """
    kernel = select(op, *arguments)
    return eager(*arguments) if kernel is None else kernel.launch(*arguments)


def select(op: str, *arguments: Any, backend: str | None = None) -> Kernel | None:
    """The kernel to launch for these arguments of the op, or None for the eager form.

    Args:
        op:        name in the table.
        arguments: those of the eager form.
        backend:   in place of the one in force.
    Raises:
        RuntimeError: backend "triton" is asked for and the op has no kernel for these arguments.
    """
    name = backend or current_backend()
    if name == "eager":
        return None
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if name == "auto" and any(tensor.device.type != "cuda" for tensor in tensors):
        return None
    reason = refusal(op, *arguments)
    if reason is None:
        return _kernels[op]
    if name == "triton":
        raise RuntimeError(f"backend 'triton' was asked for, but {op} {reason}")
    return None


def refusal(op: str, *arguments: Any) -> str | None:
    """Why the op has no kernel for these arguments, to follow its name in a message; None if it has one."""
    kernel = _kernels.get(op)
    if kernel is None:
        return "has no kernel"
    for tensor in [value for value in arguments if isinstance(value, Tensor)]:
        if not runtime.can_run(tensor.device):
            return f"cannot run a kernel on {tensor.device}"
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in kernel.dtypes:
            return f"has no kernel for {tensor.dtype}"
        if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu":
            return "has no kernel for torch.bfloat16 in Triton's interpreter, whose products of it are wrong"
    return kernel.refuses(*arguments)


def same_device(**tensors: Tensor | None) -> None:
    """Check that an op's inputs are on one device.

    Raises:
        ValueError: they are not; the message names each.
    """
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        named = ", ".join(f"{name} on {place}" for name, place in places.items())
        raise ValueError(f"inputs must be on one device, got {named}")
