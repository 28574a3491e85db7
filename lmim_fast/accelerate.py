"""accelerate(model): swap what has a fast form in somebody else's model, and say what was and what not."""

from __future__ import annotations

import fnmatch
import sys
import types
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lmim_fast.layers.accelerated.base import Accelerated, Form, swap
from lmim_fast.layers.accelerated.check import Verdict, compare, signature
from lmim_fast.layers.accelerated.guided import GUIDED_ATTENTION, GUIDED_DECODER_LAYER
from lmim_fast.layers.accelerated.record import hooked, original_class
from lmim_fast.layers.accelerated.report import AccelerationReport, Row, undo
from lmim_fast.layers.accelerated.torch_layers import LAYER_NORM, MULTIHEAD_ATTENTION
from lmim_fast.layers.accelerated.transformer import DECODER_LAYER, ENCODER_LAYER
from lmim_fast.layers.accelerated.vit import ATTENTION, BLOCK, MASKING, MLP

__all__ = ["AccelerationReport", "Row", "accelerate", "undo"]

# A module is of the first kind that it fits.
FORMS = (
    ENCODER_LAYER,
    DECODER_LAYER,
    BLOCK,
    GUIDED_DECODER_LAYER,
    MULTIHEAD_ATTENTION,
    GUIDED_ATTENTION,
    ATTENTION,
    MLP,
    LAYER_NORM,
    MASKING,
)
Only = type | str | Iterable[type | str]


def accelerate(model: nn.Module, only: Only | None = None, *, frozen: bool = False) -> AccelerationReport:
    """Give every layer of a model that is known the fast form of it, in place.

    A swapped layer keeps its parameters, names, state dict and identity: optimisers made before go on, and
    `isinstance` holds. What a fast form does not cover (masks, say) runs the layer's own forward, and the
    report says so. Call it before torch.compile, DDP and FSDP.

    Args:
        model:  any module; its layers are looked through from the outside in.
        only:   classes, and patterns of dotted names as in `fnmatch` ("encoder.*"): a layer is swapped
                where it is an instance of one or its name matches one. None for all.
        frozen: swap layers too of which no parameter is trained.
    Returns:
        what was swapped, what was left, and why; `undo()` or the end of a `with` block takes it back.
    Raises:
        TypeError: the model is no module, or `only` holds neither class nor pattern.
        ValueError: `only` matches none of the layers that could be swapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    walk = _Walk(_selection(only), frozen)
    walk.visit("", model, covered=False)
    if only is not None and not walk.matched:
        known = ", ".join(f"{kind} ({count})" for kind, count in sorted(walk.known.items())) or "none"
        raise ValueError(f"only={only!r} matches no layer that could be swapped; there are: {known}")
    return AccelerationReport(walk.rows)


class _Walk:
    """One pass over a model."""

    def __init__(self, only: tuple[type | str, ...] | None, frozen: bool) -> None:
        self.only, self.frozen = only, frozen
        self.rows: list[Row] = []
        self.known: Counter[str] = Counter()
        self.matched = False
        self._seen: dict[nn.Module, Row | None] = {}
        self._checked: dict[tuple[Any, ...], Verdict] = {}

    def visit(self, name: str, module: nn.Module, covered: bool) -> None:
        """Swap the module where it can be, then look into it; `covered`: part of a layer in the table."""
        if module in self._seen:
            self._shared(name, module)
            return
        self._seen[module] = None
        kind = original_class(module).__name__
        closed = _closed(module)
        form = None if closed else next((form for form in FORMS if form.fits(module)), None)
        if closed or form is None:
            own = any(parameter is not None for parameter in module._parameters.values())
            if self.only is None and (closed or (own and not covered)):
                self._add(Row(name, kind, False, closed or "no fast form", module))
        else:
            self.known[form.kind] += 1
            if self._selected(name, module):
                self.matched = True
                self._treat(name, module, form, kind)
            covered |= form.parts
        if not closed:
            for child_name, child in module._modules.items():
                if child is not None:
                    self.visit(f"{name}.{child_name}" if name else child_name, child, covered)

    def _treat(self, name: str, module: nn.Module, form: Form, kind: str) -> None:
        """Swap the module or say why not."""
        if isinstance(module, Accelerated):
            self._add(Row(name, kind, False, "swapped already", module))
            return
        reason = self._obstacle(module, form)
        if reason is None:
            verdict = self._check(module, form)
            reason = verdict.reason or swap(module, form, verdict.dropout)
        swapped_part = "" if form.parts else f"its {form.kind}"
        self._add(Row(name, kind, reason is None, reason or swapped_part, module))

    def _obstacle(self, module: nn.Module, form: Form) -> str | None:
        """Why the module has to be left alone, or None."""
        parameters = list(module.parameters())
        if parameters and not self.frozen and not any(parameter.requires_grad for parameter in parameters):
            return "frozen; pass frozen=True to swap it too"
        for part in module.modules() if form.parts else ():
            where = "" if part is module else f" in its {original_class(part).__name__}"
            if hooked(part):
                return f"has hooks or a patched forward{where}"
            if hasattr(part, "parametrizations"):
                return f"has a parametrized weight{where}"
            if part is not module and _closed(part):
                return f"holds a part that is left alone: {_closed(part)}"
        devices = sorted({str(parameter.device) for parameter in parameters})
        if form.parts and len(devices) > 1:
            return f"its parameters are on several devices: {', '.join(devices)}"
        return form.unlike(module)

    def _check(self, module: nn.Module, form: Form) -> Verdict:
        """Result of running both forms, once for all modules that compute the same."""
        if form.examples is None:
            return Verdict(None)
        key = signature(module, form) if form.run is None else (form.kind, id(module))
        if key not in self._checked:
            self._checked[key] = compare(module, form)
        return self._checked[key]

    def _selected(self, name: str, module: nn.Module) -> bool:
        if self.only is None:
            return True
        return any(
            fnmatch.fnmatchcase(name, each) if isinstance(each, str) else isinstance(module, each)
            for each in self.only
        )

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self._seen[row.module] = row

    def _shared(self, name: str, module: nn.Module) -> None:
        """A second name of a module that was met before."""
        row = self._seen[module]
        if row is not None:
            self.rows.append(
                Row(name, row.kind, row.swapped, f"same module as {row.name}", module, shared=True)
            )


def _selection(only: Only | None) -> tuple[type | str, ...] | None:
    if only is None:
        return None
    entries = (only,) if isinstance(only, type | str) else tuple(only)
    for entry in entries:
        if not isinstance(entry, type | str):
            raise TypeError(f"only takes classes and name patterns, got {entry!r}")
    return entries


def _closed(module: nn.Module) -> str | None:
    """Why nothing in this module is looked at, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    homes = [base.__module__ for base in type(module).__mro__]
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        return "compiled; accelerate it before torch.compile"
    if any(home.startswith(("torch.nn.parallel", "torch.distributed")) for home in homes):
        return "wrapped for several devices; accelerate it before"
    if original_class(module).__module__.startswith(("lmim_fast.layers", "lmim_fast.models")):
        return "fast already"
    return None


class _CallableModule(types.ModuleType):
    """`lmim_fast.accelerate` is this module and is called as the function, whichever was imported first."""

    def __call__(self, *arguments: Any, **options: Any) -> AccelerationReport:
        return accelerate(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
