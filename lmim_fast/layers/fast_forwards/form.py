"""A fast forward is bound on the instance: the class, the parts and the pickle of a layer stay as they are.

At a call the form reads what it needs of the layer. Where a part is not what it knows, or the call has what
it lacks, it raises `Left`, and the layer's own forward runs, which calls its parts.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmim_fast.ops import attention_backends, dispatch

_METHODS = ("forward", "random_masking", "_replicate_for_data_parallel")
_notes: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()


class Left(Exception):
    """Why a layer or a call is left to the layer's own forward."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Form:
    """A fast forward of a kind of layer.

    read:   (layer) to what the form needs of it; raises `Left` if the layer is not as the form knows it.
    run:    (layer, *arguments of the method) to its result; raises `Left` before it computes anything.
    method: that it stands for.
    """

    read: Callable[[Any], object]
    run: Callable[..., Any]
    method: str = "forward"


def may_run(x: object) -> bool:
    """True for a tensor on a device with kernels, or any tensor while a backend is asked for by name.

    Elsewhere the layer's own forward runs: no fast form was measured to be faster on a CPU.
    """
    if not isinstance(x, Tensor):
        return False
    return x.is_cuda or dispatch.is_asked_for() or attention_backends.is_asked_for()


def bind(module: nn.Module, form: Form) -> None:
    """Give the layer its fast forward."""
    original, method = getattr(type(module), form.method), form.method
    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def fast(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        if may_run(arguments[0] if arguments else next(iter(named.values()), None)):
            try:
                if getattr(type(self), method) is not original:
                    raise Left(f"{method} of its class was patched")
                inputs, options = _positional(names, arguments, named) if named else (arguments, named)
                return form.run(self, *inputs, **options)
            except Left as left:
                if not torch.compiler.is_compiling():
                    note(self, left.reason)
        return getattr(type(self), method)(self, *arguments, **named)

    fast.accelerates = True  # type: ignore[attr-defined]
    vars(module)[form.method] = types.MethodType(fast, module)
    vars(module)[_replicate_for_data_parallel.__name__] = types.MethodType(
        _replicate_for_data_parallel, module
    )


def _positional(
    names: tuple[str, ...], arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with those that are given by the next names in order moved to their places."""
    inputs, rest = list(arguments), dict(named)
    for name in names[len(inputs) :]:
        if name not in rest:
            break
        inputs.append(rest.pop(name))
    return tuple(inputs), rest


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """A replica of nn.DataParallel, without the fast forward: that is bound to the weights of this layer."""
    replica: nn.Module = type(self)._replicate_for_data_parallel(self)
    unbind(replica)
    return replica


_replicate_for_data_parallel.accelerates = True  # type: ignore[attr-defined]


def is_bound(module: nn.Module) -> bool:
    """Whether the layer has a fast forward."""
    return any(getattr(vars(module).get(name), "accelerates", False) for name in _METHODS)


def unbind(module: nn.Module) -> None:
    """Give the layer its own forward back."""
    for name in _METHODS:
        method = vars(module).get(name)
        own = getattr(method, "__func__", None) is getattr(type(module), name, None)
        if getattr(method, "accelerates", False) or (
            method is not None and own
        ):  # a loaded pickle has its own
            del vars(module)[name]
    _notes.pop(module, None)


def note(module: nn.Module, reason: str) -> None:
    """Keep for the report, once, why a call is left to the layer's own forward."""
    noted = _notes.setdefault(module, [])
    if reason not in noted:
        noted.append(reason)


def notes(module: nn.Module) -> list[str]:
    """Why calls of this layer were left to its own forward."""
    return _notes.get(module, [])
