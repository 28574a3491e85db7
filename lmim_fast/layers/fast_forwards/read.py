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
_CALL = nn.Linear.__call__  # that of all modules

Read = TypeVar("Read")
TENSORS = (Tensor, nn.Parameter)  # while a program is exported they are others: the original is exported
LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)


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
    return name == kind and cls.forward is forward and parts.is_bare(part)


def require(condition: bool, text: str, *values: object) -> None:
    """Raise `Left` of a text and its values unless the condition holds."""
    if not condition:
        raise Left(text, *values)


def child(layer: nn.Module, name: str) -> Any:
    """A part of a layer, or None."""
    return layer._modules.get(name)


def linear(layer: nn.Module, name: str, *, bias: bool = False) -> Linear:
    """Weight and bias of a plain linear; `bias`: it must have one."""
    part: Any = layer._modules.get(name)
    if type(part) not in LINEARS or not parts.is_bare(part):
        raise Left(_unlike(name, part, type(part) in LINEARS))
    weight, own_bias = part._parameters.get("weight"), part._parameters.get("bias")
    if type(weight) not in TENSORS or (own_bias is not None and type(own_bias) not in TENSORS):
        raise Left(_unlike(name, part, True))
    if bias and own_bias is None:
        raise Left("{} has no bias", name)
    return Linear(weight, own_bias)


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
    if len(module.normalized_shape) != 1:
        raise Left("normalises over several dimensions")
    if type(weight) not in TENSORS or type(bias) not in TENSORS:
        raise Left("has no ordinary weight and bias")
    if module.__dict__.get("_fast_norm"):
        raise Left("is timm's fast norm")
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
        text, *values = left.args
    raise Left(f"{name}: {text}", *values)  # here, as torch 2.11 cannot compile `from None`


def holds_only(layer: nn.Module, *names: str) -> None:
    """Check that a layer has no other parts, and no parameters or buffers, as a later version of it may."""
    if set(names).issuperset(layer._modules) and not layer._parameters and not layer._buffers:
        return
    others = [*layer._modules.keys() - set(names), *layer._parameters, *layer._buffers]
    raise Left("has {} beside what its form knows", ", ".join(sorted(others)))


def absent(layer: nn.Module, *names: str) -> None:
    """Parts that must be missing, None or identities."""
    for name in names:
        part = layer._modules.get(name)
        if part is not None and not parts.is_plain(part, nn.Identity):
            raise Left(_unlike(name, part, type(part) is nn.Identity))


def dropout(layer: nn.Module, *names: str) -> float:
    """Probability in force of the first of these dropouts, or numbers, that a layer has; 0 without any."""
    for name in names:
        part = layer._modules.get(name)
        if part is None:
            number = layer.__dict__.get(name)
            if not isinstance(number, float | int):
                continue
            p = number if layer.training else 0.0
        elif type(part) is nn.Dropout and parts.is_bare(part):
            p = part.p if part.training else 0.0
            if part.p and part.training != layer.training:
                raise Left("{} is not in the mode of its layer", name)
        elif parts.is_plain(part, nn.Identity):
            return 0.0
        else:
            raise Left(_unlike(name, part, type(part) is nn.Dropout))
        if not 0 <= p < 1:
            raise Left("{} is {}", name, p)
        return float(p)
    return 0.0


def activation(layer: nn.Module, name: str) -> Any:
    """The activation to call; None for exact GELU, which is fused."""
    act = getattr(layer, name, None)
    if isinstance(act, nn.Module):
        exact = parts.is_plain(act, nn.GELU) and act.approximate == "none"
        return None if exact or (_is_exact(act) and parts.is_plain(act, type(act))) else act
    require(callable(act), "{} is {}", name, act)
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
            if parts.is_plain(part, nn.Identity):
                return None
            idle = is_known(part, "drop path") and (not part.training or not part.drop_prob)
            return None if idle else part
    return None


def check_heads(rows: int, heads: int, scale: float | None) -> None:
    """Check that a joint projection to queries, keys and values can be split, and is scaled as usual."""
    width = rows // 3
    require(rows == 3 * width and width % heads == 0, "{} heads for projections of {} rows", heads, rows)
    require(scale is None or abs(scale * (width // heads) ** 0.5 - 1) < 1e-6, "its scale is {}", scale)


def unset(*values: object, **options: object) -> None:
    """Options of a call that must be None or False."""
    for value in values:
        require(value is None or value is False, "a mask or an option is given")
    for name, value in options.items():
        require(value is None or value is False, "{} is given", name)


def rows(width: int, *inputs: Any, weights: tuple[Tensor | None, ...], dims: int | None = 3) -> None:
    """Check the inputs of a call against the weights that it reads.

    Args:
        width:   features of each input; at most what the norm's kernel takes.
        inputs:  of one device and batch layout.
        weights: or None.
        dims:    of each input; None: any but 0.
    """
    require(not transformed(), "a torch.func transform or forward-mode differentiation")
    require(
        not parts.hooks_on_all() and nn.Linear.__call__ is _CALL,
        "hooks on all modules or a patch of torch.nn",
    )
    require(width <= MAX_WIDTH, "rows of {} values, more than {}", width, MAX_WIDTH)
    first = inputs[0]
    require(type(first) in TENSORS, "input of type {}", type(first).__name__)
    require(not first.is_nested, "nested input")
    device, dtype = first.device, first.dtype
    require(device.type != "meta", "input on meta")
    autocast = torch.is_autocast_enabled(device.type)
    taken = (torch.float32, torch.get_autocast_dtype(device.type)) if autocast else (dtype,)
    require(not first.is_cuda or dtype in dispatch.DTYPES, "no kernel for {}", dtype)
    for x in inputs:
        require(type(x) in TENSORS and not x.is_nested, "input of type {}", type(x).__name__)
        require(x.dim() == dims if dims else x.dim() > 0, "input with {} dimensions", x.dim())
        require(x.shape[-1] == width and x.numel() > 0, "input of shape {}", x.shape)
        same = x.device == device and x.dtype in taken and x.is_floating_point()
        require(same, "input in {} on {}", x.dtype, x.device)
    held = (dtype, torch.float32) if autocast else (dtype,)
    for weight in weights:
        if weight is not None and (weight.dtype not in held or weight.device != device):
            raise Left("a parameter in {} on {} for {} on {}", weight.dtype, weight.device, dtype, device)


def _unlike(name: str, part: object, same_class: bool) -> str:
    """Why a part is not used as it is."""
    if part is None:
        return f"has no {name}"
    if not same_class:
        return f"{name} is a {qualified(part)}"
    assert isinstance(part, nn.Module)
    if "forward" in vars(part) and not parts.is_fast(vars(part)["forward"]):
        return f"{name} has a patched forward"
    if part._compiled_call_impl is not None:
        return f"{name} is compiled"
    if parts.is_plain(part, type(part)):
        return f"{name} has a patched class, or a weight that is no ordinary parameter"
    return f"{name} has hooks"
