"""Whether a layer may read the weights of its parts, or has to call them.

A part is plain if calling it does no more than its class says. A layer calls every part that is not plain:
one that was replaced, adapted (LoRA), hooked, pruned, parametrized, quantised, sharded or compiled. It reads
the weights of the part again once the part is plain again.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module

TENSORS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)  # the last two while a program is exported
Part = TypeVar("Part", bound=nn.Module)


def is_plain(part: Any, cls: type[Part]) -> TypeGuard[Part]:
    """True for a module of exactly this class that nothing is attached to.

    Attached are hooks, a `forward` of its own (but not that of `accelerate`) and torch.compile. A
    parametrization changes the class; pruning and weight norm are hooks.
    """
    return type(part) is cls and is_bare(part)


def is_bare(part: Any) -> bool:
    """True for a module that nothing is attached to, whatever its class."""
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return False
    forward = part.__dict__.get("forward")
    return part._compiled_call_impl is None and (forward is None or is_fast(forward))


def is_fast(method: Any) -> bool:
    """True for a method that `accelerate` has bound; wrappers have its attributes, but are others."""
    function = getattr(method, "__func__", None)
    return function is not None and getattr(function, "accelerates", None) is function


def is_linear(part: Any) -> TypeGuard[nn.Linear]:
    """True for a plain nn.Linear whose weight and bias are ordinary tensors."""
    return is_plain(part, nn.Linear) and has_tensors(part)


def is_biased_linear(part: Any) -> TypeGuard[nn.Linear]:
    """True for a plain nn.Linear, as `is_linear`, that has a bias."""
    return is_linear(part) and part._parameters["bias"] is not None


def is_norm(part: Any) -> TypeGuard[nn.LayerNorm]:
    """True for a plain nn.LayerNorm over the last dimension whose weight and bias are ordinary tensors."""
    return (
        is_plain(part, nn.LayerNorm)
        and has_tensors(part)
        and part._parameters["bias"] is not None
        and len(part.normalized_shape) == 1
    )


def has_tensors(part: nn.Module, weight: str = "weight", bias: str = "bias") -> bool:
    """True if a part's weight, and its bias unless that is None, are parameters and ordinary tensors.

    What hooks and users compute is no parameter; that of a quantised or sharded part is of a subclass.

    Args:
        weight, bias: their names.
    """
    parameters = part._parameters
    if bias not in parameters:
        return False
    shift = parameters[bias]
    return type(parameters.get(weight)) in TENSORS and (shift is None or type(shift) in TENSORS)


def _forwards() -> tuple[Any, ...]:
    """Of PyTorch's classes that layers read in place of calling."""
    return nn.Linear.forward, nn.LayerNorm.forward, nn.Dropout.forward, nn.GELU.forward, nn.Identity.forward


_FORWARDS = _forwards()


def hooks_on_all() -> bool:
    """True if every part of the process is to be called: while hooks are registered for all modules, or the
    forward of a class of PyTorch that layers read is patched."""
    return _forwards() != _FORWARDS or torch_module._has_any_global_hook()
