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

from lmim_fast.layers.parts import is_fast
from lmim_fast.ops import dispatch

_METHODS = ("forward", "random_masking", "_replicate_for_data_parallel")
_MOST_NOTES = 8
_notes: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()


class Left(Exception):
    """Why a layer or a call is left to its own forward: a text with places for the values behind it.

    It is formatted when it is read: torch.compile cannot trace that, and calls need not wait for it.
    """

    @property
    def reason(self) -> str:
        """The text with its values."""
        text, *values = self.args
        return str(text).format(*(tuple(each) if isinstance(each, torch.Size) else each for each in values))


@dataclass(frozen=True)
class Form:
    """A fast forward of a kind of layer.

    read:   (layer) to what the form needs of it; raises `Left` if the layer is not as the form knows it.
    run:    (layer, *arguments of the method) to its result; raises `Left` before it computes anything.
    method: that it stands for.
    steps:  other methods that it stands for, since that method calls them.
    """

    read: Callable[[Any], object]
    run: Callable[..., Any]
    method: str = "forward"
    steps: tuple[str, ...] = ()


class _NoInput:
    """Stands for a first argument that is given by name; no CPU tensor, so that the names are looked at."""

    is_cuda = True


_NO_INPUT = _NoInput()


def bind(module: nn.Module, form: Form) -> None:
    """Give the layer its fast forward.

    It runs on devices with kernels, and everywhere while a backend is asked for by name. Elsewhere the
    layer's own forward runs, as no fast form was measured to be faster on a CPU. Little is done before it: a
    microsecond would slow small layers down.
    """
    cls, method = type(module), form.method
    original = getattr(cls, method)
    steps = [(name, getattr(cls, name, None)) for name in form.steps]
    names = positions(original)
    environment, key = dispatch.environment, dispatch.KEY

    @functools.wraps(original)
    def fast(self: nn.Module, x: Any = _NO_INPUT, /, *more: Any, **named: Any) -> Any:
        own = type(self).forward if method == "forward" else getattr(type(self), method)
        try:
            fits = x.is_cuda is True or dispatch.override is not None or key in environment
        except AttributeError:  # no tensor
            fits = True
        if not fits:
            return own(self, x, *more, **named) if more or named else own(self, x)
        arguments = more if x is _NO_INPUT else (x, *more)
        inputs, options = by_position(names, arguments, named) if named else (arguments, named)
        if inputs and isinstance(inputs[0], Tensor) and (inputs[0].is_cuda or dispatch.is_asked_for()):
            try:
                if own is not original and not (_is_sharded(self) and getattr(cls, method) is original):
                    raise Left("{} of its class was patched", method)
                for name, step in steps:
                    if name in self.__dict__ or getattr(cls, name, None) is not step:
                        raise Left("its {} was patched", name)
                if torch._C._get_tracing_state():
                    raise Left("torch.jit is tracing")
                if torch.compiler._is_exporting_flag:  # the function says True of torch 2.11's compiler too
                    raise Left("torch.export is tracing")
                return form.run(self, *inputs, **options)
            except Left as left:
                if not torch.compiler.is_compiling():
                    note(self, left.reason)
        return own(self, *arguments, **named)

    fast.accelerates = fast  # type: ignore[attr-defined]
    vars(module)[method] = types.MethodType(fast, module)
    vars(module)[_replicate_for_data_parallel.__name__] = types.MethodType(
        _replicate_for_data_parallel, module
    )


def _is_sharded(module: nn.Module) -> bool:
    """True for a class that `fully_shard` has made; what it adds to a forward computes the same."""
    return type(module).__module__.startswith("torch.distributed.fsdp")


def positions(method: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments behind `self` that may be given by position."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return tuple(each.name for each in parameters if each.kind == each.POSITIONAL_OR_KEYWORD)


def by_position(
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


_replicate_for_data_parallel.accelerates = _replicate_for_data_parallel  # type: ignore[attr-defined]


def is_bound(module: nn.Module) -> bool:
    """Whether the layer has a fast forward."""
    return any(is_fast(vars(module).get(name)) for name in _METHODS)


def unbind(module: nn.Module) -> None:
    """Give the layer its own forward back."""
    for name in _METHODS:
        if is_fast(vars(module).get(name)):
            del vars(module)[name]
    _notes.pop(module, None)


def forget_pickled(module: nn.Module) -> None:
    """Take the methods of its own class out of a layer, which a loaded pickle has in place of fast ones."""
    for name in _METHODS:
        method = vars(module).get(name)
        if method is not None and getattr(method, "__func__", None) is getattr(type(module), name, None):
            del vars(module)[name]


def note(module: nn.Module, reason: str) -> None:
    """Keep for the report, once, why a call is left to the layer's own forward; the first few, as reasons
    with values in them have no end."""
    noted = _notes.setdefault(module, [])
    if reason not in noted and len(noted) < _MOST_NOTES:
        noted.append(reason)


def notes(module: nn.Module) -> list[str]:
    """Why calls of this layer were left to its own forward."""
    return _notes.get(module, [])
