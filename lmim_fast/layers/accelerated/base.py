"""What the fast forms of somebody else's layers share: classes, and when a call is left to the original.

A layer is swapped by its class alone: a subclass of the original's, with another forward. Parameters,
buffers, names, hooks and the object itself stay; the old class undoes it.
"""

from __future__ import annotations

import copyreg
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN = (Tensor, nn.Parameter)
_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
_reasons: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()


class Accelerated(nn.Module):
    """Base of all fast forms; put before the original class by `fast_class`."""

    _accelerated_from: ClassVar[type[nn.Module]]
    _accelerated_form: ClassVar[type[nn.Module]]
    _accelerated_parts: tuple[type[nn.Module], ...]  # classes of `parts_of` at the swap

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
        body = dict(_accelerated_from=original, _accelerated_form=mixin, __module__=original.__module__)
        name = f"Accelerated{original.__name__}"
        _classes[mixin, original] = types.new_class(name, (mixin, original), {}, lambda ns: ns.update(body))
    return _classes[mixin, original]


def _new(mixin: type[Accelerated], original: type[nn.Module]) -> nn.Module:
    """An empty instance, for copy and pickle."""
    cls = fast_class(mixin, original)
    return cls.__new__(cls)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was swapped."""
    return getattr(type(module), "_accelerated_from", type(module))


def swap(module: nn.Module, form: Form) -> str | None:
    """Give the module the fast form; a reason where its class does not let itself be replaced."""
    parts = tuple(original_class(part) for part in parts_of(module)) if form.parts else None
    try:
        module.__class__ = fast_class(form.mixin, type(module))
    except TypeError as error:  # a metaclass, a layout or an __init_subclass__ that refuses
        return f"its class cannot be extended: {error}"
    if parts is not None:
        vars(module)["_accelerated_parts"] = parts
    return None


def restore(module: nn.Module) -> None:
    """Give the module its own class back."""
    module.__class__ = original_class(module)
    vars(module).pop("_accelerated_parts", None)
    _reasons.pop(module, None)


def call_original(module: nn.Module, reason: str, *arguments: Any, **named: Any) -> Any:
    """The original forward; the reason is noted once for the report."""
    if not torch.compiler.is_compiling():
        noted = _reasons.setdefault(module, [])
        if reason not in noted:
            noted.append(reason)
    return original_class(module).forward(module, *arguments, **named)


def reasons(module: nn.Module) -> list[str]:
    """Why calls of this module were left to its original forward."""
    return _reasons.get(module, [])


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The module and all modules in it; faster than modules(), and a part with two places comes twice."""
    parts = [module]
    for child in module._modules.values():
        if child is not None:
            parts += parts_of(child)
    return parts


def hooked(module: nn.Module) -> bool:
    """Whether something runs around the module's forward, or in its place."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def given(**options: object) -> str | None:
    """The first option that is set, as a reason."""
    for name, value in options.items():
        if value is not None and value is not False:
            return f"{name} given"
    return None


def refusal(module: nn.Module, width: int, *inputs: Tensor, dims: int | None = 3) -> str | None:
    """Why the fast form does not take these inputs, or the module as it is now; None where it does.

    Args:
        module: the swapped layer.
        width:  features that each input must have in its last dimension.
        inputs: tensors; all of one batch layout.
        dims:   dimensions that each must have; None for any but 0.
    """
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        return "a torch.func transform or forward-mode differentiation"
    first = inputs[0]
    if not isinstance(first, Tensor):
        return f"input of type {type(first).__name__}"
    device, dtype = first.device, first.dtype
    autocast = torch.is_autocast_enabled(device.type)
    taken = (torch.float32, torch.get_autocast_dtype(device.type)) if autocast else (dtype,)
    for x in inputs:
        if type(x) not in PLAIN or x.is_nested:
            return f"input of type {'NestedTensor' if x.is_nested else type(x).__name__}"
        if x.dim() == 0 or (dims is not None and x.dim() != dims):
            return f"input with {x.dim()} dimensions"
        if x.shape[-1] != width or 0 in x.shape:
            return f"input of shape {tuple(x.shape)}"
        if x.device != device or x.dtype not in taken or not x.is_floating_point():
            return f"input in {x.dtype} on {x.device}"
    return _changed(module, device, (dtype, torch.float32) if autocast else (dtype,))


def _changed(module: Any, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """What is no longer as it was checked, or does not fit the input. Runs at every call: kept cheap."""
    parts = parts_of(module)
    if len(parts) != len(module._accelerated_parts):
        return "a part was added or removed"
    seen = None
    for part, known in zip(parts, module._accelerated_parts, strict=True):
        if type(part) is not known and original_class(part) is not known:
            return f"a {known.__name__} was replaced"
        if part is not module and hooked(part):
            return f"hooks on its {known.__name__}"
        for parameter in part._parameters.values():
            if parameter is None:
                continue
            if type(parameter) not in PLAIN or parameter.device != device:
                return f"parameter of type {type(parameter).__name__} on {parameter.device}"
            dtype = parameter.dtype
            if dtype is not seen and (seen is not None or dtype not in dtypes):
                return f"parameters in {dtype} beside {seen or dtypes[0]}"
            seen = dtype
    return None


def dropout_of(module: nn.Module, *names: str) -> float:
    """Probability in force of the first of these children or numbers that the module has; 0 without any."""
    for name in names:
        dropout = getattr(module, name, None)
        if isinstance(dropout, nn.Dropout):
            return dropout.p if dropout.training else 0.0
        if isinstance(dropout, float | int):
            return float(dropout) if module.training else 0.0
    return 0.0
