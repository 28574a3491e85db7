"""What the fast forms of somebody else's layers share: classes, and when a call is left to the original.

A layer is swapped by its class alone: a subclass of the original's, with another forward. Parameters,
buffers, names, hooks and the object itself stay; the old class undoes it.
"""

from __future__ import annotations

import copyreg
import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lmim_fast.layers.accelerated.record import PLAIN, RECORD, changed, equal, original_class, remember
from lmim_fast.layers.plain import has_few_rows
from lmim_fast.ops.transforms import transformed

_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
_reasons: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()


class Parameters(NamedTuple):
    """Names that a forward takes by position, and the defaults of all."""

    positional: tuple[str, ...]
    defaults: dict[str, Any]


class Accelerated(nn.Module):
    """Base of all fast forms; put before the original class by `fast_class`."""

    _accelerated_from: ClassVar[type[nn.Module]]
    _accelerated_form: ClassVar[type[nn.Module]]
    _accelerated_inputs: ClassVar[Parameters]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_new, (self._accelerated_form, self._accelerated_from), *reduced[2:])


@dataclass(frozen=True)
class Form:
    """A kind of layer that has a fast form.

    kind:     its name in the report.
    mixin:    the fast forward.
    fits:     whether a module is of this kind.
    unlike:   a reason why the fast form would not compute what the module does, or None.
    examples: inputs on which the two forms are compared; None for classes whose forward is known.
    run:      calls a module on an example in place of its forward.
    parts:    the fast form reads the module's parts itself, so they must stay as they were checked.
    """

    kind: str
    mixin: type[Accelerated]
    fits: Callable[[nn.Module], bool]
    unlike: Callable[[Any], str | None]
    examples: Callable[[Any], list[tuple[Any, ...]]] | None = None
    run: Callable[..., tuple[Tensor, ...]] | None = None
    parts: bool = True


def fast_class(mixin: type[Accelerated], original: type[nn.Module]) -> type[nn.Module]:
    """Subclass of `original` with the fast forward of `mixin`; one for each pair."""
    if (mixin, original) not in _classes:
        body: dict[str, Any] = dict(
            _accelerated_from=original,
            _accelerated_form=mixin,
            _accelerated_inputs=_parameters(original.forward),
            __module__=original.__module__,
        )
        if "forward" in vars(mixin):
            body["forward"] = _never_slower(mixin.forward, original)
        name = f"Accelerated{original.__name__}"
        _classes[mixin, original] = types.new_class(name, (mixin, original), {}, lambda ns: ns.update(body))
    return _classes[mixin, original]


def _never_slower(fast: Callable[..., Any], original: type[nn.Module]) -> Callable[..., Any]:
    """The fast forward, but the original one for a few rows on a CPU, where the fast one would gain nothing.

    With the original's parameters, which torch.export and others read.
    """

    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        form = original.forward if arguments and has_few_rows(arguments[0]) else fast
        return form(self, *arguments, **named)

    forward.__doc__, forward.__qualname__ = fast.__doc__, fast.__qualname__
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    return forward


def _parameters(forward: Callable[..., Any]) -> Parameters:
    """Those of a method, without `self`."""
    entries = list(inspect.signature(forward).parameters.values())[1:]
    named = [each for each in entries if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    positional = tuple(each.name for each in named if each.kind != each.KEYWORD_ONLY)
    return Parameters(positional, {each.name: each.default for each in named})


def _new(mixin: type[Accelerated], original: type[nn.Module]) -> nn.Module:
    """An empty instance, for copy and pickle."""
    cls = fast_class(mixin, original)
    return cls.__new__(cls)


def swap(module: nn.Module, form: Form, dropout: bool = True) -> str | None:
    """Give the module the fast form; a reason where its class does not let itself be replaced.

    `dropout`: its dropout is known to be where the fast form has it.
    """
    try:
        module.__class__ = fast_class(form.mixin, type(module))
    except (TypeError, ValueError) as error:  # a metaclass, a layout, a signature, an __init_subclass__
        return f"its class cannot be extended: {error}"
    remember(module, form.parts, dropout)
    return None


def restore(module: nn.Module) -> None:
    """Give the module its own class back."""
    module.__class__ = original_class(module)
    vars(module).pop(RECORD, None)
    _reasons.pop(module, None)


def note(module: nn.Module, reason: str) -> None:
    """Keep for the report, once, why a call is left to the original."""
    if not torch.compiler.is_compiling():
        noted = _reasons.setdefault(module, [])
        if reason not in noted:
            noted.append(reason)


def call_original(module: nn.Module, reason: str, *arguments: Any, **named: Any) -> Any:
    """The original forward; the reason is noted."""
    note(module, reason)
    return original_class(module).forward(module, *arguments, **named)


def reasons(module: nn.Module) -> list[str]:
    """Why calls of this module were left to its original forward."""
    return _reasons.get(module, [])


def given(**options: object) -> str | None:
    """The first option that is set, as a reason."""
    for name, value in options.items():
        if value is not None and value is not False:
            return f"{name} given"
    return None


def bind(
    module: Any, count: int, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], str | None]:
    """The first `count` arguments of the original's forward, by whatever name it calls them.

    Returns:
        the arguments, and a reason (without them) where another one is not what it is by default.
    """
    if not named and len(arguments) == count:
        return arguments, None
    known = module._accelerated_inputs
    found = dict(zip(known.positional, arguments, strict=False)) | named
    if len(arguments) > len(known.positional) or len(found) < len(arguments) + len(named):
        return (), "more arguments given"
    inputs = known.positional[:count]
    for name, value in found.items():
        default = known.defaults.get(name, inspect.Parameter.empty)
        if name not in inputs and not (value is default or equal(value, default)):
            return (), f"{name} given"
    if len(inputs) < count or any(name not in found for name in inputs):
        return (), "an argument is missing"
    return tuple(found[name] for name in inputs), None


def refusal(module: nn.Module, width: int, *inputs: Tensor, batched: bool = True) -> str | None:
    """Why the fast form does not take these inputs, or the module as it is now; None where it does.

    Args:
        module:  the swapped layer.
        width:   features that each input must have in its last dimension.
        inputs:  tensors; all of one batch layout.
        batched: each must have three dimensions; else any but 0.
    """
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if transformed():
        return "a torch.func transform or forward-mode differentiation"
    first = inputs[0]
    if not isinstance(first, Tensor):
        return f"input of type {type(first).__name__}"
    device, dtype = first.device, first.dtype
    if device.type == "meta":
        return "input on meta"
    autocast = torch.is_autocast_enabled(device.type)
    taken = (torch.float32, torch.get_autocast_dtype(device.type)) if autocast else (dtype,)
    for x in inputs:
        if type(x) not in PLAIN or x.is_nested:
            return f"input of type {'NestedTensor' if x.is_nested else type(x).__name__}"
        if x.dim() == 0 or (batched and x.dim() != 3):
            return f"input with {x.dim()} dimensions"
        if x.shape[-1] != width or 0 in x.shape:
            return f"input of shape {tuple(x.shape)}"
        if x.device != device or x.dtype not in taken or not x.is_floating_point():
            return f"input in {x.dtype} on {x.device}"
    return changed(module, device, (dtype, torch.float32) if autocast else (dtype,))


def example(*shape: int, size: float = 1.0) -> Tensor:
    """What stands for an input to try a layer on: random values of this shape and size."""
    return torch.full(shape, size, dtype=torch.float64, device="cpu")


def dropout_of(module: nn.Module, *names: str) -> float:
    """Probability in force of the first of these children or numbers that the module has; 0 without any."""
    for name in names:
        dropout = getattr(module, name, None)
        if isinstance(dropout, nn.Dropout):
            return dropout.p if dropout.training else 0.0
        if isinstance(dropout, float | int):
            return float(dropout) if module.training else 0.0
    return 0.0
