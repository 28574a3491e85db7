"""Which form of an op runs, kernel or eager, or on a CPU that in C++ where there is one.

An op checks its arguments and asks `takes`. `LMIM_FAST_BACKEND` (auto, eager or triton) and the `backend`
context manager override the answer. "auto" launches kernels on CUDA devices alone; in Triton's interpreter,
on a CPU, they run where "triton" is asked for by name. Forms in C++ run with "auto" alone. torch.func and
forward mode cannot differentiate kernels: eager forms run under them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lmim_fast.kernels import runtime
from lmim_fast.ops.transforms import transformed

BACKENDS = ("auto", "eager", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of kernels; they take integers of any kind

VARIABLE = "LMIM_FAST_BACKEND"

override: str | None = None  # of the innermost `backend` block
# What is behind os.environ, whose own methods cost the host more than a small op of PyTorch.
environment = os.environ._data  # type: ignore[attr-defined]
KEY = os.environ.encodekey(VARIABLE)


def is_asked_for() -> bool:
    """Whether a backend but "auto" is in force, by a `backend` block or by LMIM_FAST_BACKEND."""
    return (override is not None or KEY in environment) and current_backend() != "auto"


def current_backend() -> str:
    """The backend in force: of the innermost `backend` block, else of LMIM_FAST_BACKEND, else "auto"."""
    name = override or os.environ.get(VARIABLE, "auto")
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on backend `name`: "auto", "eager" or "triton"."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    global override
    previous, override = override, name
    try:
        yield
    finally:
        override = previous


def takes(
    op: str, tensors: Sequence[Tensor | None], reason: str | None = None, *results: torch.dtype
) -> bool:
    """True if the kernel of an op runs, False for its eager form.

    Args:
        op:      name, for the error.
        tensors: its inputs, on one device; the first is no None.
        reason:  why the kernel does not fit these inputs, to follow the op's name; None: it does.
        results: dtypes that the kernel computes or writes, beside those of the inputs.
    Raises:
        RuntimeError: backend "triton" is asked for and the kernel does not fit.
    """
    name = current_backend()
    first = tensors[0]
    assert first is not None
    if name == "eager" or (name == "auto" and first.device.type != "cuda"):
        return False
    reason = refusal(tensors, reason, *results)
    if reason is not None and name == "triton":
        raise RuntimeError(f"backend 'triton' was asked for, but {op} {reason}")
    return reason is None


def takes_native(device: torch.device) -> bool:
    """True if an op's form in C++ may run in place of the eager one: on a CPU, no backend being asked for."""
    return device.type == "cpu" and current_backend() == "auto"


def refusal(tensors: Sequence[Tensor | None], reason: str | None = None, *results: torch.dtype) -> str | None:
    """Why no kernel runs on these inputs of `takes`, to follow the op's name; None if one does."""
    device = next(tensor.device for tensor in tensors if tensor is not None)
    if not runtime.can_run(device):
        return f"cannot run a kernel on {device}"
    if transformed():
        return "has no kernel under a torch.func transform or forward-mode differentiation"
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    for dtype in (*dtypes, *results):
        if dtype not in DTYPES and dtype.is_floating_point:
            return f"has no kernel for {'results in ' if dtype not in dtypes else ''}{dtype}"
        if dtype == torch.bfloat16 and runtime.interpreted(device):
            return f"has no kernel for {dtype} in Triton's interpreter, which multiplies it wrongly"
    return reason


def same_device(**tensors: Tensor | None) -> None:
    """Check that an op's inputs are on one device.

    Raises:
        ValueError: they are not; the message names each.
    """
    first = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
            named = ", ".join(f"{name} on {place}" for name, place in places.items())
            raise ValueError(f"inputs must be on one device, got {named}")
