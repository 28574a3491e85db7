"""Outputs and gradients of a third-party model before and after `accelerate`, and which layers run fast."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accelerated.models import SIZES, Size, Subject, subject
from benchmarks.operation import launches
from lmim_fast import accelerate
from lmim_fast.ops import dispatch

MODES = ("train", "eval", "frozen", "inference")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
_ZERO = 1e-7  # of the largest gradient, in fp64: what is below is mathematically zero (the bias of keys)

Gradients = dict[str, Tensor | None]


def compare(name: str, size: Size = SIZES["small"]) -> dict[str, Any]:
    """Rows of `accelerate`, and the largest differences by dtype and mode, with the fast forms run eagerly.

    Args:
        name: of `MODELS`.
        size: of the model.
    Returns:
        "swapped", "left": counts by class and reason. "own_forward": calls that ran it, by class and reason.
        "differences": a row a dtype and mode of `MODES`: the largest relative differences of outputs and of
        gradients, and the gradient it is of; or "error" if the model itself cannot run in this dtype.
    Raises:
        ImportError: the library is not installed.
    """
    report = accelerate(subject(name, size).model)
    result: dict[str, Any] = {
        "swapped": _counted([row.kind for row in report.swapped]),
        "left": _counted([f"{row.kind}: {row.reason}" for row in report.left]),
    }
    zero = zero_gradients(name, size)
    rows, own = [], Counter[str]()
    for dtype in DTYPES:
        for mode in MODES:
            rows.append({"dtype": dtype, "mode": mode, **_difference(name, size, dtype, mode, zero, own)})
    return result | {"own_forward": dict(own), "differences": rows}


def kernels(name: str, size: Size = SIZES["tiny"]) -> dict[str, Any]:
    """Kernels that a forward and a backward pass launch in Triton's interpreter, and their differences.

    Raises:
        ImportError: the library is not installed.
    """
    plain, fast = subject(name, size), subject(name, size)
    expected = run(plain)
    with launches() as launched, dispatch.backend("triton"):
        accelerate(fast.model)
        found = run(fast)
    zero = zero_gradients(name, size)
    return {"launches": _counted(launched), **largest(expected, found, zero)}


def _difference(
    name: str, size: Size, dtype: str, mode: str, zero: set[str], own: Counter[str]
) -> dict[str, Any]:
    plain, fast = (subject(name, size, dtype=DTYPES[dtype]) for _ in range(2))
    for each in (plain, fast):
        each.model.train(mode == "train")
        if mode == "frozen":
            each.model.requires_grad_(False)
    with torch.set_grad_enabled(mode != "inference"):
        return _compared(plain, fast, zero, own)


def _compared(plain: Subject, fast: Subject, zero: set[str], own: Counter[str]) -> dict[str, Any]:
    try:
        expected = run(plain)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    with dispatch.backend("eager"):
        report = accelerate(fast.model)
        with own_forwards(fast.model) as ran:
            found = run(fast)
    own.update(f"{kind}: {_notes(report, kind)}" for kind in ran.elements())
    report.undo()
    again = run(fast)
    row = largest(expected, found, zero)
    return row | {"undone": largest(expected, again, zero)["output"] == 0.0}


def _notes(report: Any, kind: str) -> str:
    """Why calls of layers of a class were left to their own forward."""
    notes = {
        reason for row in report.swapped if row.kind == kind for reason in row.note.split("; ") if reason
    }
    return "; ".join(sorted(notes)).replace("runs its own forward: ", "")


def run(each: Subject) -> tuple[list[Tensor], Gradients]:
    """Outputs, and the gradients of parameters and floating inputs; the loss weighs outputs at random."""
    leaves: dict[str, Tensor] = {
        name: value for name, value in each.model.named_parameters() if value.requires_grad
    }
    leaves |= {f"input {n}": x.requires_grad_() for n, x in enumerate(each.inputs) if x.is_floating_point()}
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(1)  # of masks
    outputs = each()
    generator = torch.Generator().manual_seed(2)
    trained = [out for out in outputs if out.requires_grad]
    weights = [torch.randn(out.shape, generator=generator).to(out) for out in trained]
    if trained:
        torch.autograd.backward(trained, weights)
    gradients = {name: None if leaf.grad is None else _whole(leaf.grad) for name, leaf in leaves.items()}
    return [out.detach() for out in outputs], gradients


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def largest(
    expected: tuple[list[Tensor], Gradients], found: tuple[list[Tensor], Gradients], zero: set[str]
) -> dict[str, Any]:
    """The largest relative differences of outputs and of gradients, and the gradient it is of."""
    outputs = [_relative(a, b) for a, b in zip(expected[0], found[0], strict=True)]
    gradients = {name: _relative(a, found[1][name]) for name, a in expected[1].items() if name not in zero}
    worst = max(gradients, key=lambda name: gradients[name], default="")
    return {"output": max(outputs), "gradient": gradients.get(worst, 0.0), "worst": worst}


def _relative(expected: Tensor | None, found: Tensor | None) -> float:
    """Largest absolute difference over the largest absolute value; infinite if one of them is missing."""
    if expected is None or found is None:
        return 0.0 if expected is found else float("inf")
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    return difference / largest if largest else difference


def zero_gradients(name: str, size: Size) -> set[str]:
    """Parameters whose gradient is mathematically zero: rounding alone makes it."""
    try:
        gradients = run(subject(name, size, dtype=torch.float64))[1]
    except RuntimeError:  # a model that casts to fp32
        return set()
    sizes = {key: float(value.abs().max()) for key, value in gradients.items() if value is not None}
    return {key for key, value in sizes.items() if value < _ZERO * max(sizes.values())}


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[Counter[str]]:
    """Count the calls inside that run the own forward of a class of which a layer of the model is swapped."""
    kinds = {
        (type(module), vars(module)[method].__wrapped__.__code__)
        for module in model.modules()
        for method in ("forward", "random_masking")
        if hasattr(vars(module).get(method), "__wrapped__")
    }
    codes = {code for _, code in kinds}
    counts = Counter[str]()

    def called(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_code not in codes:
            return
        values = frame.f_locals
        layer = values["self"] if "self" in values else next(iter(values.get("args", ())), None)
        for kind, code in kinds:
            if isinstance(layer, kind) and code is frame.f_code:  # FSDP2 makes a subclass
                counts[f"{kind.__module__}.{kind.__name__}"] += 1

    previous = sys.getprofile()
    sys.setprofile(called)
    try:
        yield counts
    finally:
        sys.setprofile(previous)


def _counted(names: list[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
