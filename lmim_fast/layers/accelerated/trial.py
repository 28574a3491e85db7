"""What a layer is tried in: by itself, attributes put back at the end, dropouts that can be compared."""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmim_fast.layers.accelerated.record import dropouts_of
from lmim_fast.ops import attention, dispatch

CONTAINERS = (dict, list, set, OrderedDict, deque, defaultdict, Counter)
DEPTH = 4  # of containers in containers that are looked at


@contextmanager
def alone() -> Iterator[None]:
    """Eager ops, gradients, no autocast, and random states that are put back, whatever is in force around."""
    python, numpy = random.getstate(), sys.modules.get("numpy.random")
    of_numpy = numpy.get_state() if numpy else None
    with ExitStack() as stack:
        for context in (
            dispatch.backend("eager"),
            attention.backend("sdpa"),
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            stack.enter_context(context)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.set_state(of_numpy)


def random_state() -> tuple[object, ...]:
    """Of the global generators of torch (CPU), Python and NumPy."""
    numpy = sys.modules.get("numpy.random")
    return torch.random.get_rng_state().tolist(), random.getstate(), str(numpy.get_state() if numpy else "")


class Attributes:
    """Attributes of a module and its parts during a trial: dropouts 0 and containers copied at first.

    `restore` puts them back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts = list(module.modules())
        self._before = [dict(vars(part)) for part in self.parts]
        self._dropouts = [(part, name) for part in self.parts for name in dropouts_of(part)]
        self.dropping = any(vars(part)[name] > 0 for part, name in self._dropouts)
        for part in self.parts:
            vars(part).update({name: _copied(value) for name, value in vars(part).items()})
        self.set_dropouts(0.0)
        self._start = [(dict(vars(part)), _contents(vars(part))) for part in self.parts]

    def set_dropouts(self, step: float) -> int:
        """Probability `step` for the first dropout, twice that for the second, ...; gives their number."""
        for number, (part, name) in enumerate(self._dropouts):
            vars(part)[name] = step * (number + 1)
        return len(self._dropouts)

    def stored(self) -> str | None:
        """Name of an attribute that something has set since, or filled."""
        for part, (start, contents) in zip(self.parts, self._start, strict=True):
            now = _contents(vars(part))
            for name, value in vars(part).items():
                changed = start.get(name) is not value or contents.get(name) != now.get(name)
                if name != "training" and (name not in start or changed):
                    return name
        return None

    def restore(self) -> None:
        """Put back what was there before."""
        for part, attributes in zip(self.parts, self._before, strict=True):
            vars(part).clear()
            vars(part).update(attributes)


class MappedDropout(TorchFunctionMode):
    """Every dropout in force is a smooth map of its values: equal results mean that it is in equal places."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replaced = {F.dropout: _mapped, F.scaled_dot_product_attention: _attend}.get(function, function)
        return replaced(*args, **(kwargs or {}))


class NormInFloat32(TorchFunctionMode):
    """LayerNorm as CUDA's autocast runs it."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (F.layer_norm, torch.layer_norm) and torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
            kwargs = {k: x.float() if isinstance(x, Tensor) else x for k, x in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))


def _mapped(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return input * (1 + p * torch.tanh(input)) if training else input


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    if dropout_p == 0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    scale = options.pop("scale", None)
    if attn_mask is not None or any(options.values()):
        raise NotImplementedError("dropout of masked attention")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _mapped((query @ key.transpose(-2, -1) * scale).softmax(-1), dropout_p) @ value


def _copied(value: Any, depth: int = DEPTH) -> Any:
    """A container, and those in it, without copying what they hold."""
    if type(value) not in CONTAINERS or depth == 0:
        return value
    other = copy.copy(value)
    if isinstance(other, dict):
        other.update({key: _copied(each, depth - 1) for key, each in other.items()})
    elif isinstance(other, list | deque):
        for index, each in enumerate(other):
            other[index] = _copied(each, depth - 1)
    return other


def _contents(attributes: dict[str, Any]) -> dict[str, object]:
    """What the containers among some attributes hold."""
    return {name: _ids(value) for name, value in attributes.items() if type(value) in CONTAINERS}


def _ids(value: Any, depth: int = DEPTH) -> object:
    if type(value) not in CONTAINERS or depth == 0:
        return value if isinstance(value, bool | int | float | str | None) else id(value)
    if isinstance(value, dict):
        return [(_ids(key), _ids(each, depth - 1)) for key, each in value.items()]
    held = [_ids(each, depth - 1) for each in value]
    return set(held) if isinstance(value, set) else held
