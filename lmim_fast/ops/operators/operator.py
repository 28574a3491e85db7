"""A function that launches kernels, as PyTorch sees it: an operator where it is traced, else a plain call.

torch.compile, torch.export, fake tensors, dispatch modes, transforms and tensor subclasses see the operator
`lmim_fast::<name>`, with its fake form and its gradient. Any other call goes to the function itself, through
an autograd function of the same gradient where one is needed: the dispatcher costs more than the launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmim_fast.ops.transforms import ordinary, transformed

Differentiate = Callable[..., tuple[Any, ...]]
_PLAIN = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, torch.dtype})


def direct(*arguments: Any) -> bool:
    """True if nothing but PyTorch's own autograd has to see a call with these arguments."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or transformed():
        return False
    for argument in arguments:
        kind = type(argument)
        if kind not in _PLAIN and not (kind is list and direct(*argument)):
            return False
    return not torch._C._get_tracing_state()


def differentiable(*arguments: Any) -> bool:
    """True if autograd records a call with these arguments; tensors in lists need no gradient."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def cast(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in `dtype`; `Tensor.to` takes time even where it has nothing to do."""
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


class Operator:
    """Callable with the arguments of `launch`; takes and returns what it does.

    Args:
        launch: allocates its results, which share memory neither with each other nor with an argument.
        fake:   makes results of the same shapes, without data.
        setup:  (ctx, inputs, output): saves for the backward pass; None: the results need no gradient.
        differentiate: (ctx, *gradients of the results, None or not, one is not) to those of the inputs.
    """

    def __init__(
        self,
        launch: Callable[..., Any],
        fake: Callable[..., Any],
        setup: Callable[..., None] | None = None,
        differentiate: Differentiate | None = None,
    ) -> None:
        self.__doc__, self.__name__ = launch.__doc__, launch.__name__.lstrip("_")
        self._launch = launch
        self.traced = torch.library.custom_op(f"lmim_fast::{self.__name__}", launch, mutates_args=())
        self.traced.register_fake(fake)
        self._apply: Callable[..., Any] | None = None
        if setup is not None and differentiate is not None:
            gradients = _first_order(_unless_none(differentiate))
            self.traced.register_autograd(gradients, setup_context=_keep_none(setup))
            self._apply = function(self.__name__, launch, setup, differentiate).apply

    def __call__(self, *arguments: Any) -> Any:
        """`launch`, called directly if it may be."""
        if not direct(*arguments):
            return self.traced(*arguments)
        if self._apply is not None and differentiable(*arguments):
            return self._apply(*arguments)
        return self._launch(*arguments)


def operator(
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    differentiate: Differentiate | None = None,
) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: the `Operator` of a function that launches kernels."""
    return lambda launch: Operator(launch, fake, setup, differentiate)


def _keep_none(setup: Callable[..., None]) -> Callable[..., None]:
    """`setup` for gradients that stay None where nobody made them."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, output)

    return keep


def _unless_none(differentiate: Differentiate) -> Differentiate:
    """`differentiate`, which is not called if no result has a gradient."""

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return differentiate(ctx, *grads)

    return gradients


def function(
    name: str, launch: Callable[..., Any], setup: Callable[..., None], differentiate: Differentiate
) -> type[torch.autograd.Function]:
    """The autograd function of plain calls."""
    setup, differentiate = _keep_none(setup), _unless_none(differentiate)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = launch(*inputs)
        setup(ctx, inputs, output)
        return output

    return type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward_of(differentiate))},
    )


def backward_of(differentiate: Differentiate) -> Differentiate:
    """`differentiate` for an autograd function."""
    first_order = _first_order(differentiate)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        gradients = first_order(ctx, *grads)
        return tuple(None if isinstance(gradient, list) else gradient for gradient in gradients)

    return backward


def _first_order(differentiate: Differentiate) -> Differentiate:
    """`differentiate`, but an error for many gradients at once, and for one that is to be differentiated.

    A later error could miss, in silence, what depends on inputs that are not kept.
    """

    def gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not ordinary(*grads):
            wanted = "create_graph" if torch.is_grad_enabled() else "is_grads_batched"
            raise RuntimeError(
                f"a kernel makes first derivatives alone, one at a time: for {wanted} run the forward pass "
                "under lmim_fast.ops.dispatch.backend('eager')"
            )
        return differentiate(ctx, *grads)

    return gradients
