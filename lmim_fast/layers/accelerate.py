"""accelerate(model): give the layers of a third-party model their fast forwards, and report which."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lmim_fast.layers.acceleration_report import AccelerationReport, Row
from lmim_fast.layers.check_forwards import compare_forwards
from lmim_fast.layers.fast_forwards import CLASSES, FORMS, PARTS
from lmim_fast.layers.fast_forwards.form import Form, Left, bind, forget_pickled, is_bound, unbind
from lmim_fast.layers.fast_forwards.read import qualified, remember
from lmim_fast.ops import dispatch

__all__ = ["AccelerationReport", "Row", "accelerate", "undo"]

Only = type | str | Iterable[type | str]
_EXPECTED = re.compile(r"(Attention|Layer|Block|Norm|Mlp|MLP|FeedForward|FFN)$")  # classes that get a row


def accelerate(
    model: nn.Module,
    only: Only | None = None,
    *,
    like: Mapping[type[nn.Module], str] | None = None,
    check: Any = None,
) -> AccelerationReport:
    """Give every layer of a model whose class is known its fast forward, in place.

    Classes are known by their exact names (`layers/fast_forwards`). The forward is bound on the instance:
    class, parameters, names, state dict, hooks and pickle of the layer stay. At a call that a fast form does
    not cover (a mask, a part that was replaced, hooked or adapted), and on devices without kernels, the
    layer's own forward runs and calls its parts; the report says why. Call it before torch.compile, DDP and
    FSDP.

    Args:
        model: any module; its layers are looked through from the outside in.
        only:  classes, and patterns of dotted names as in `fnmatch` ("encoder.*"): a layer is swapped where
               it is an instance of one or its name matches one. None for all.
        like:  for classes of your own, the name of the form that computes the same of the same arguments,
               {MyBlock: "timm.Block"}; see `fast_forwards.FORMS`. They stay known in later calls.
        check: inputs of the model, a tuple of positional or a dict of named ones, or one tensor. Both
               forwards of each layer run once in evaluation mode on what reaches it; a layer whose outputs
               or gradients differ is left, with the difference.
    Returns:
        what was swapped, what was left, and why; `undo()` or the end of a `with` block takes it back.
    Raises:
        TypeError:  the model is no module, or `only` or `like` holds something else than is said above.
        ValueError: `only` matches none of the layers that could be swapped, or `like` names no form.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    walk = _Walk(_selection(only), _likeness(like))
    for module in model.modules():
        forget_pickled(module)
        walk.kind(module)
    walk.visit("", model, covered=False)
    if only is not None and not walk.matched:
        known = ", ".join(f"{kind} ({count})" for kind, count in sorted(walk.known.items())) or "none"
        raise ValueError(f"only={only!r} matches no layer that could be swapped; there are: {known}")
    rows = walk.rows
    if check is not None:
        likened = {module for module in walk.chosen if type(module) in walk.like}
        differ = compare_forwards(model, walk.chosen, check, must_run=likened)
        rows = [
            replace(row, swapped=False, reason=differ[row.module]) if row.module in differ else row
            for row in rows
        ]
    report = AccelerationReport(rows, torch.cuda.is_available() or dispatch.is_asked_for())
    for row in report.swapped if report.can_run else ():
        bind(row.module, walk.chosen[row.module])
    return report


def undo(model: nn.Module) -> None:
    """Give every layer of a model its own forward back, whichever call swapped it; for copies of a model."""
    for module in model.modules():
        unbind(module)


class _Walk:
    """One pass over a model."""

    def __init__(self, only: tuple[type | str, ...] | None, like: Mapping[type[nn.Module], str]) -> None:
        self.only, self.like = only, like
        self.rows: list[Row] = []
        self.chosen: dict[nn.Module, Form] = {}
        self.known: Counter[str] = Counter()
        self.matched = False
        self._seen: dict[nn.Module, Row | None] = {}

    def visit(self, name: str, module: nn.Module, covered: bool) -> None:
        """Choose the module if it can be swapped, then look into it; `covered`: part of a swapped layer."""
        if module in self._seen:
            row = self._seen[module]
            if row is not None:
                self.rows.append(replace(row, name=name, reason=f"same module as {row.name}"))
            return
        self._seen[module] = None
        closed = _closed(module)
        kind = None if closed else self.kind(module)
        if kind in FORMS:
            self.known[kind] += 1
            if self._selected(name, module):
                self.matched = True
                covered |= self._choose(name, module, FORMS[kind])
        elif self.only is None and (closed or (not covered and _is_expected(module))):
            self._add(Row(name, qualified(module), False, closed or "no fast form", module))
        if not closed:
            for child_name, child in module._modules.items():
                if child is not None:
                    self.visit(f"{name}.{child_name}" if name else child_name, child, covered)

    def kind(self, module: nn.Module) -> str | None:
        """Name of the form of the module's class, which layers around it look up from now on."""
        name = qualified(module)
        kind = self.like.get(type(module)) or CLASSES.get(name) or PARTS.get(name)
        if kind is not None and not self._patched(module, "forward"):
            remember(type(module), kind)
        return kind

    def _patched(self, module: nn.Module, method: str) -> str:
        """Why a method of a known class is not the one that is known, or ""."""
        cls = type(module)
        owner = next((base for base in cls.__mro__ if method in vars(base)), None)
        if cls in self.like or owner is None:
            return ""
        function = vars(owner)[method]
        # Where it was written: functools.wraps copies `__module__`.
        home = getattr(function, "__globals__", {}).get("__name__") or str(function.__module__)
        if home.split(".")[0] == owner.__module__.split(".")[0]:
            return ""
        return f"the {method} of its class was patched by {home}"

    def _choose(self, name: str, module: nn.Module, form: Form) -> bool:
        """Whether the module is to be swapped; adds its row."""
        reason = "swapped already" if is_bound(module) else self._obstacle(module, form)
        note = "" if form.method == "forward" else f"its {form.method}"
        if not reason:
            self.chosen[module] = form
        self._add(Row(name, qualified(module), not reason, reason or note, module))
        return not reason and not note

    def _obstacle(self, module: nn.Module, form: Form) -> str:
        """Why the module has to be left alone, or ""."""
        cls = type(module)
        if not hasattr(cls, form.method):
            return f"has no {form.method}"
        methods = form.method, *form.steps
        for name in methods:
            own = vars(module).get(name)
            if own is not None and getattr(own, "__func__", 0) is not getattr(cls, name, None):
                return f"has a patched {name}"
        try:
            with torch.no_grad():
                form.read(module)
        except Left as left:
            return left.reason
        except AttributeError as error:  # of a class that is not what `like` says
            return str(error)
        return next(filter(None, (self._patched(module, name) for name in methods)), "")

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


def _selection(only: Only | None) -> tuple[type | str, ...] | None:
    if only is None:
        return None
    entries = tuple(only) if isinstance(only, Iterable) and not isinstance(only, type | str) else (only,)
    for entry in entries:
        if not isinstance(entry, type | str):
            raise TypeError(f"only takes classes and name patterns, got {entry!r}")
    return entries


def _likeness(like: Mapping[type[nn.Module], str] | None) -> Mapping[type[nn.Module], str]:
    for cls, name in (like or {}).items():
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"like takes module classes, got {cls!r}")
        if name not in FORMS and name not in PARTS.values():
            raise ValueError(f"like names an unknown form {name!r}; choose from {', '.join(FORMS)}")
    return like or {}


def _is_expected(module: nn.Module) -> bool:
    """Whether a reader of the table looks for this layer."""
    own = any(parameter is not None for parameter in module._parameters.values())
    return own or _EXPECTED.search(type(module).__name__) is not None


def _closed(module: nn.Module) -> str | None:
    """Why nothing in this module is looked at, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    homes = [base.__module__ for base in type(module).__mro__]
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        return "compiled; accelerate it before torch.compile"
    if any(home.startswith(("torch.nn.parallel", "torch.distributed")) for home in homes):
        return "wrapped for several devices; accelerate it before"
    if type(module).__module__.startswith(("lmim_fast.layers", "lmim_fast.models")):
        return "fast already"
    return None
