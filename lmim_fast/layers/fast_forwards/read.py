"""What a fast form may rely on in a layer and in a call; everything else raises `Left`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lmim_fast.layers import parts
from lmim_fast.layers.fast_forwards.form import Left
from lmim_fast.ops import dispatch
from lmim_fast.ops.norm import MAX_WIDTH
from lmim_fast.ops.transforms import transformed

_known: dict[type, tuple[str, Any]] = {}  # name of the form of each class that was met, and its forward

Read = TypeVar("Read")
TENSORS = (Tensor, nn.Parameter)


class Linear(NamedTuple):
    """Weight (F, D) and bias (F,), or None, of a linear, as they are used."""

    weight: Tensor
    bias: Any


class Norm(NamedTuple):
    """Weight, bias (D,) and eps of a LayerNorm."""

    weight: Tensor
    bias: Tensor
    eps: float


def qualified(module: object) -> str:
    """Name of an object's class, with that of its module."""
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def remember(cls: type[nn.Module], kind: str) -> None:
    """Let layers know that a class has the form `kind`, or is a part that they know under this name."""
    _known[cls] = kind, cls.forward


def is_known(part: Any, kind: str) -> bool:
    """True for a part of a class of this kind to which nothing is attached."""
    cls = type(part)
    name, forward = _known.get(cls, (None, None))
    return name == kind and cls.forward is forward and parts.is_plain(part, cls)


def require(condition: bool, reason: str) -> None:
    """Raise `Left` unless the condition holds."""
    if not condition:
        raise Left(reason)


def child(layer: nn.Module, name: str) -> Any:
    """A part of a layer, or None."""
    return layer._modules.get(name)


def linear(layer: nn.Module, name: str, *, bias: bool = False) -> Linear:
    """Weight and bias of a plain linear; `bias`: it must have one."""
    part = child(layer, name)
    if not parts.is_linear(part) and not (
        parts.is_plain(part, NonDynamicallyQuantizableLinear) and parts.has_tensors(part)
    ):
        raise Left(_unlike(name, part, type(part) is nn.Linear))
    if bias and part.bias is None:
        raise Left(f"{name} has no bias")
    return Linear(part.weight, part.bias)


def joined(*linears: Linear) -> Linear:
    """Several linears of one input as one."""
    biases = [each.bias for each in linears if each.bias is not None]
    require(len(biases) in (0, len(linears)), "some of its projections have a bias")
    return Linear(torch.cat([each.weight for each in linears]), torch.cat(biases) if biases else None)


def norm(layer: nn.Module, name: str) -> Norm:
    """Weight, bias and eps of a plain LayerNorm over the last dimension."""
    return within(layer, name, "torch.LayerNorm", norm_of)


def norm_of(module: Any) -> Norm:
    """Weight, bias and eps of a LayerNorm over the last dimension."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    require(len(module.normalized_shape) == 1, "normalises over several dimensions")
    require(type(weight) in TENSORS and type(bias) in TENSORS, "has no ordinary weight and bias")
    require(not getattr(module, "_fast_norm", False), "is timm's fast norm")
    return Norm(weight, bias, module.eps)


def known(layer: nn.Module, name: str, kind: str) -> Any:
    """A part whose class has the form `kind` and to which nothing is attached."""
    part = child(layer, name)
    if not is_known(part, kind):
        raise Left(_unlike(name, part, _known.get(type(part), (None,))[0] == kind))
    return part


def within(layer: nn.Module, name: str, kind: str, reader: Callable[[Any], Read]) -> Read:
    """What `reader` reads of a part of this kind."""
    part = known(layer, name, kind)
    try:
        return reader(part)
    except Left as left:
        raise Left(f"{name}: {left.reason}") from None


def absent(layer: nn.Module, *names: str) -> None:
    """Parts that must be missing, None or identities."""
    for name in names:
        part = child(layer, name)
        if part is not None and not parts.is_plain(part, nn.Identity):
            raise Left(_unlike(name, part, type(part) is nn.Identity))


def dropout(layer: nn.Module, *names: str) -> float:
    """Probability in force of the first of these dropouts, or numbers, that a layer has; 0 without any."""
    for name in names:
        part = child(layer, name)
        if part is None:
            number = getattr(layer, name, None)
            if not isinstance(number, float | int):
                continue
            p = float(number) if layer.training else 0.0
        elif parts.is_plain(part, nn.Dropout):
            p = part.p if part.training else 0.0
            require(not part.p or part.training == layer.training, f"{name} is not in the mode of its layer")
        elif parts.is_plain(part, nn.Identity):
            return 0.0
        else:
            raise Left(_unlike(name, part, type(part) is nn.Dropout))
        require(0 <= p < 1, f"{name} is {p}")
        return p
    return 0.0


def activation(layer: nn.Module, name: str) -> Any:
    """The activation to call; None for exact GELU, which is fused."""
    act = child(layer, name) if name in layer._modules else getattr(layer, name, None)
    if isinstance(act, nn.Module):
        require(next(act.parameters(), None) is None, f"{name} has parameters")
        exact = parts.is_plain(act, nn.GELU) and act.approximate == "none"
        return None if exact or (_is_exact(act) and parts.is_plain(act, type(act))) else act
    require(callable(act), f"{name} is {act!r}")
    return None if act is torch.nn.functional.gelu else act


def _is_exact(act: nn.Module) -> bool:
    """True for classes that are exact GELU under another name."""
    if qualified(act) == "timm.layers.activations.GELU":
        return True
    return qualified(act) == "transformers.activations.GELUActivation" and act.act is nn.functional.gelu


def called(layer: nn.Module, *names: str) -> Any:
    """The first part of these names, to be called; None for an identity and for idle stochastic depth."""
    for name in names:
        part = child(layer, name)
        if part is not None:
            idle = is_known(part, "drop path") and (not part.training or not part.drop_prob)
            return None if idle or parts.is_plain(part, nn.Identity) else part
    return None


def unset(*values: object, **options: object) -> None:
    """Options of a call that must be None or False."""
    for value in values:
        require(value is None or value is False, "a mask or an option is given")
    for name, value in options.items():
        require(value is None or value is False, f"{name} is given")


def rows(width: int, *inputs: Any, weights: tuple[Tensor | None, ...], dims: int | None = 3) -> None:
    """Check the inputs of a call against the weights that it reads.

    Args:
        width:   features of each input; at most what the norm's kernel takes.
        inputs:  of one device and batch layout.
        weights: or None.
        dims:    of each input; None: any but 0.
    """
    require(not torch._C._get_tracing_state(), "torch.jit is tracing")
    require(not transformed(), "a torch.func transform or forward-mode differentiation")
    require(not parts.hooks_on_all(), "hooks on all modules")
    require(width <= MAX_WIDTH, f"rows of {width} values, more than {MAX_WIDTH}")
    first = inputs[0]
    require(type(first) in TENSORS and not first.is_nested, f"input of type {type(first).__name__}")
    device, dtype = first.device, first.dtype
    autocast = torch.is_autocast_enabled(device.type)
    taken = (torch.float32, torch.get_autocast_dtype(device.type)) if autocast else (dtype,)
    require(device.type != "meta", "input on meta")
    require(not first.is_cuda or dtype in dispatch.DTYPES, f"no kernel for {dtype}")
    for x in inputs:
        require(type(x) in TENSORS and not x.is_nested, f"input of type {type(x).__name__}")
        require(x.dim() == dims if dims else x.dim() > 0, f"input with {x.dim()} dimensions")
        require(x.shape[-1] == width and x.numel() > 0, f"input of shape {tuple(x.shape)}")
        require(
            x.device == device and x.dtype in taken and x.is_floating_point(),
            f"input in {x.dtype} on {x.device}",
        )
    held = (dtype, torch.float32) if autocast else (dtype,)
    for weight in weights:
        if weight is not None and (weight.dtype not in held or weight.device != device):
            raise Left(f"a parameter in {weight.dtype} on {weight.device} for {dtype} on {device}")


def _unlike(name: str, part: object, same_class: bool) -> str:
    """Why a part is not used as it is."""
    if part is None:
        return f"has no {name}"
    if not same_class:
        return f"{name} is a {qualified(part)}"
    assert isinstance(part, nn.Module)
    if "forward" in vars(part):
        return f"{name} has a patched forward"
    if part._compiled_call_impl is not None:
        return f"{name} is compiled"
    if parts.is_plain(part, type(part)):
        return f"{name} has a patched class, or a weight that is no ordinary parameter"
    return f"{name} has hooks"
