"""What a swapped layer was when it was checked, and what of it has changed since."""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

PLAIN = (Tensor, nn.Parameter)
RECORD = "_accelerated_record"
INTERNALS = frozenset(vars(nn.Module())) | {"_compiled_call_impl", RECORD}
# Attributes that may be a dropout probability; read at every call.
PROBABILITIES = ("dropout", "attn_drop", "proj_drop", "drop", "drop1", "drop2")
_COMPILER_COUNTS = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
_MISSING = object()


class Part(NamedTuple):
    """One module of a swapped layer.

    module:     None for the layer itself, which a copy shares its record with.
    cls:        its class before a swap.
    children:   its modules.
    attributes: names and values of what somebody has set on it, without the dropouts.
    size:       number of its attributes in all.
    parameters: number of its parameters that are not None.
    dropouts:   names of its attributes that are dropout probabilities.
    """

    module: nn.Module | None
    cls: type[nn.Module]
    children: tuple[nn.Module | None, ...]
    attributes: tuple[tuple[str, Any], ...]
    size: int
    parameters: int
    dropouts: tuple[str, ...]


class Code:
    """Functions and flags of classes. A copy holds the same; a pickle those of the classes it finds."""

    def __init__(self, classes: tuple[type[nn.Module], ...]) -> None:
        self.classes = classes
        self.entries = tuple((cls, name, getattr(cls, name)) for cls in classes for name in _names(cls))

    def __reduce__(self) -> Any:
        return Code, (self.classes,)

    def __deepcopy__(self, memo: object) -> Code:
        return self


class Record(NamedTuple):
    """A layer at the swap; `limit` is the highest dropout probability that its fast form may take."""

    code: Code
    parts: tuple[Part, ...]
    limit: float


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was swapped."""
    return getattr(type(module), "_accelerated_from", type(module))


def remember(module: nn.Module, parts: bool, dropout: bool) -> None:
    """Keep what a layer is now.

    Args:
        module:  the layer.
        parts:   its modules too, not its own attributes alone.
        dropout: its dropout is where the fast form has it, so its probability may change.
    """
    modules = parts_of(module) if parts else [module]
    classes = tuple(dict.fromkeys(original_class(part) for part in modules))
    kept = tuple(_part(part, part is module, parts) for part in modules)
    vars(module)[RECORD] = Record(Code(classes), kept, 1.0 if dropout else 0.0)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The module and all modules in it; a part with two places comes twice."""
    parts = [module]
    for child in module._modules.values():
        if child is not None:
            parts += parts_of(child)
    return parts


def dropouts_of(part: nn.Module) -> tuple[str, ...]:
    """Names of the attributes of one module that are dropout probabilities."""
    names = ("p",) if isinstance(part, nn.Dropout) else PROBABILITIES
    return tuple(name for name in names if _is_number(vars(part).get(name)))


def hooked(module: nn.Module) -> bool:
    """Whether something runs around the module's forward, or in its place."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def changed_itself(module: nn.Module) -> str | None:
    """What has changed of a layer's class and own attributes since the swap, or None."""
    record: Record = module.__dict__[RECORD]
    return _changed_code(record.code) or _changed_attributes(record.parts[0], module.__dict__)


def changed(module: nn.Module, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """What is no longer as it was checked, or does not fit the input. Runs at every call: kept cheap."""
    record: Record = module.__dict__[RECORD]
    reason = _changed_code(record.code)
    if reason:
        return reason
    if not torch.compiler.is_compiling() and module_hooks._has_any_global_hook():
        return "hooks on all modules"
    seen, countable = None, _countable()
    for known in record.parts:
        part, cls, children, attributes, size, parameters, dropouts = known
        if part is None:
            part = module
        own = part.__dict__
        if part is not module:
            if type(part) is not cls and original_class(part) is not cls:
                return f"changed since the swap: class of its {cls.__name__}"
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            ):
                return f"hooks on its {cls.__name__}"
        modules = own["_modules"]
        if (children or modules) and tuple(modules.values()) != children:
            return _replaced(children, tuple(modules.values()))
        # As _changed_attributes, which is called only where something differs.
        if (len(own) - (RECORD in own) != size) if countable else ("forward" in own):
            reason = _changed_attributes(known, own)
            if reason:
                return reason
        for name, value in attributes:
            if own.get(name) is not value and _changed_attributes(known, own):
                return _changed_attributes(known, own)
        for name in dropouts:
            p: Any = own.get(name)
            if not _is_number(p) or not (0 <= p < 1 and p <= record.limit):
                return f"changed since the swap: {name} of its {cls.__name__} is {p}"
            if part.training is not module.training:
                return f"its {cls.__name__} is not in the mode that it is in"
        present = 0
        for parameter in own["_parameters"].values():
            if parameter is None:
                continue
            present += 1
            if type(parameter) not in PLAIN or parameter.device != device:
                return f"parameter of type {type(parameter).__name__} on {parameter.device}"
            dtype = parameter.dtype
            if dtype is not seen and (seen is not None or dtype not in dtypes):
                return f"parameters in {dtype} beside {seen or dtypes[0]}"
            seen = dtype
        if present != parameters:
            return f"changed since the swap: parameters of its {cls.__name__}"
    return None


def _part(part: nn.Module, is_layer: bool, parts: bool) -> Part:
    own = {name: value for name, value in vars(part).items() if name != RECORD}
    dropouts = dropouts_of(part) if parts else ()
    attributes = tuple((k, v) for k, v in own.items() if k not in INTERNALS and k not in dropouts)
    return Part(
        None if is_layer else part,
        original_class(part),
        tuple(part._modules.values()),
        attributes,
        len(own),
        sum(parameter is not None for parameter in part._parameters.values()),
        dropouts,
    )


def _names(cls: type[nn.Module]) -> list[str]:
    """The forward of torch's classes; of others every function and plain value of their own."""
    names = ["forward"]
    for base in cls.__mro__:
        if not base.__module__.startswith("torch.") and base is not object:
            names += [name for name in vars(base) if not name.startswith("__") and name not in names]
    kinds = (types.FunctionType, bool, int, float, str, type(None))
    return [name for name in names if isinstance(getattr(cls, name, _MISSING), kinds)]


def _changed_code(code: Code) -> str | None:
    for cls, name, value in code.entries:
        if getattr(cls, name, None) is not value:
            return f"changed since the swap: {name} of {cls.__name__}"
    return None


def _changed_attributes(known: Part, own: dict[str, Any]) -> str | None:
    """An attribute with another value, or a new one.

    New private ones that the class does not know are taken for what wrappers (FSDP, say) keep there.
    """
    for name, value in known.attributes:
        found = own.get(name, _MISSING)
        if found is not value and not equal(found, value):
            return f"changed since the swap: {name} of its {known.cls.__name__}"
    if not _countable():
        return f"changed since the swap: forward of its {known.cls.__name__}" if "forward" in own else None
    old = {*(name for name, _ in known.attributes), *known.dropouts, *INTERNALS}
    for name in own:
        if name not in old and (not name.startswith("_") or hasattr(known.cls, name)):
            return f"changed since the swap: {name} of its {known.cls.__name__}"
    return None


def _countable() -> bool:
    """Whether a module's attributes can be gone through: not while PyTorch before 2.13 compiles.

    Of new attributes only a `forward` is seen there.
    """
    return _COMPILER_COUNTS or not torch.compiler.is_compiling()


def equal(found: object, value: object) -> bool:
    """Whether two plain values are the same; False for others."""
    return type(found) is type(value) and isinstance(value, bool | int | float | str) and found == value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _replaced(before: tuple[nn.Module | None, ...], after: tuple[nn.Module | None, ...]) -> str:
    if len(before) != len(after):
        return "a part was added or removed"
    old = next(old for old, new in zip(before, after, strict=True) if old is not new)
    return f"a {'None' if old is None else original_class(old).__name__} was replaced"
