"""Accelerated models under the wrappers of `wrappers.py`, compared with the models as they are."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from benchmarks.accelerated.models import SIZES, Subject, subject
from benchmarks.accelerated.transforms import GRAPHS
from benchmarks.accelerated.values import largest, own_forwards, run, zero_gradients
from benchmarks.accelerated.wrappers import FIRST, ORDERS, WRAPPERS
from lmim_fast import accelerate
from lmim_fast.ops import dispatch

MODELS = ("timm ViT", "torch encoder, post-norm, gelu")
_SIZE = SIZES["small"]


def measure(names: tuple[str, ...] = MODELS) -> list[dict[str, Any]]:
    """A row a model, wrapper and order: "runs" (fast, original, in part) and differences, or "refused".

    "unwrapped" is the error that the model as it is gives under the wrapper, "absent" a missing library.
    """
    rows = []
    with _group():
        for name in names:
            for wrapper, orders in ORDERS.items():
                for order in orders:
                    row = _row(name, wrapper, order)
                    rows.append({"model": name, "wrapper": wrapper, "order": order, **row})
    return rows


def _row(name: str, wrapper: str, order: str) -> dict[str, Any]:
    try:
        plain = _Wrapped(name, wrapper, None)
    except ImportError as error:
        return {"absent": str(error).splitlines()[0]}
    except Exception as error:  # whatever the wrapper raises
        return {"unwrapped": _words(error)}
    try:
        fast = _Wrapped(name, wrapper, order)
    except Exception as error:
        return {"refused": _words(error)}
    return {
        "runs": _verdict(plain, fast),
        "own_forward": dict(fast.own),
        "swapped": fast.swapped,
        "warnings": sorted(set(fast.warnings) - set(plain.warnings)),
        "notes": fast.notes,
        **largest(plain.result, fast.result, zero_gradients(name, _SIZE)),
    }


class _Wrapped:
    """A model under a wrapper, run once forward and backward; `order` None: not accelerated."""

    def __init__(self, name: str, wrapper: str, order: str | None) -> None:
        each = subject(name, _SIZE)
        for x in each.inputs:
            x.requires_grad_(x.is_floating_point())
        marks = subject(name, _SIZE).model  # tells which classes are swapped
        with dispatch.backend("eager"):  # which binds the forwards on a machine without a device
            accelerate(marks)
        torch.manual_seed(4)
        with warnings.catch_warnings(record=True) as caught, dispatch.backend("eager"):
            warnings.simplefilter("always")
            report = accelerate(each.model) if order == FIRST else None
            module = WRAPPERS[wrapper](each)
            if order not in (None, FIRST):
                report = accelerate(module)
            with own_forwards(marks) as self.own:
                self.result = run(Subject(module, each.inputs, each.options))
        self.warnings = [str(warning.message).splitlines()[0] for warning in caught]
        self.graph = GRAPHS[wrapper](module) if wrapper in GRAPHS else None
        self.swapped = 0 if report is None else len(report.swapped)
        self.notes = (
            []
            if report is None
            else sorted({f"{row.kind}: {row.note}" for row in report.swapped if row.note})
        )


def _verdict(plain: _Wrapped, fast: _Wrapped) -> str:
    """By the operators of graphs, else by the calls of the layers' own forwards."""
    if plain.graph is not None:
        return "original" if fast.graph == plain.graph else "fast"
    if not fast.own:
        return "fast"
    return "original" if fast.own == plain.own else "in part"


def _words(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


@contextmanager
def _group() -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        try:
            yield
        finally:
            distributed.destroy_process_group()
