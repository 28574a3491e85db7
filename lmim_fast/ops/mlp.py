"""MLP with exact GELU, in the epilogues of its products or in a separate pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmim_fast.ops import dispatch, gelu
from lmim_fast.ops.epilogue import in_epilogue
from lmim_fast.ops.gelu import bias_gelu
from lmim_fast.ops.linear import linear, linear_recomputing, matmul


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *, p: float = 0.0, epilogue: str = "auto"
) -> Tensor:
    """dropout(gelu(x @ weight1.T + bias1)) @ weight2.T with the exact (erf) GELU.

    The second bias is added by the op that consumes the result. For the backward pass x and one tensor of
    hidden rows, those before the GELU, are kept.

    GELU in the epilogues saves a launch and reading the hidden rows once in the forward pass; in the backward
    pass it saves the launch that recomputes the GELU, and writing and reading their gradient once. It risks
    more: Triton's products against cuBLAS's, and 16 instructions a hidden value forward, 28 backward, that
    overlap with the tensor cores only through a second program on the multiprocessor.

    Args:
        x:        (..., D) fp32 | bf16 | fp16.
        weight1:  (F, D), any float dtype, cast to x's dtype.
        bias1:    (F,), any float dtype; the kernel adds it in fp32.
        weight2:  (D2, F), any float dtype, cast to x's dtype.
        p:        dropout probability of the hidden values; above 0 the GELU runs in a separate pass.
        epilogue: "auto", "on" or "off": `ops/epilogue.py`.
    Returns:
        (..., D2) in x's dtype.
    Raises:
        ValueError:   shapes that do not fit, a dtype that is no float, inputs on several devices, or an
            unknown `epilogue`.
        RuntimeError: the epilogue is "on", and the kernel does not take these inputs.
    Source: Hendrycks and Gimpel 2016 (GELU); the MLP of Dosovitskiy et al. 2021.
    """
    _check(x, weight1, bias1, weight2)
    if not p and in_epilogue(epilogue, x, weight1, bias1, weight2):
        return launch_mlp(x, weight1, bias1, weight2)
    return gelu_linear(linear(x, weight1), bias1, weight2, p=p)


def _check(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> None:
    inputs = dict(x=x, weight1=weight1, bias1=bias1, weight2=weight2)
    features = weight1.shape[0] if weight1.ndim else 0
    fits = x.ndim >= 1 and weight1.shape == (features, x.shape[-1]) and bias1.shape == (features,)
    if not fits or weight2.ndim != 2 or weight2.shape[1] != features:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        raise ValueError(f"need x (..., D), weight1 (F, D), bias1 (F,), weight2 (D2, F), got {shapes}")
    for name, tensor in inputs.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a float dtype, got {tensor.dtype}")
    dispatch.same_device(**inputs)


def gelu_linear(hidden: Tensor, bias: Tensor, weight: Tensor, *, p: float = 0.0) -> Tensor:
    """dropout(gelu(hidden + bias)) @ weight.T; takes `hidden` over, which may hold anything afterwards.

    Without dropout one (..., F) tensor is kept for the backward pass: `hidden`, or the sum in its memory.

    Args:
        hidden: (..., F) product without its bias, any float dtype.
        bias:   (F,), any float dtype.
        weight: (D, F), any float dtype, cast to hidden's dtype.
        p:      dropout probability.
    Returns:
        (..., D) in hidden's dtype.
    Raises:
        ValueError: as `bias_gelu`.
    """
    gelu.check(hidden, bias)
    if p:
        return linear(bias_gelu(hidden, bias, p=p), weight)
    if torch.compiler.is_compiling() or dispatch.select("bias_gelu", hidden, bias, p, None) is not None:
        return linear_recomputing(bias_gelu(hidden, bias), weight, bias_gelu, hidden, bias)
    bias, weight = bias.to(hidden.dtype), weight.to(hidden.dtype)
    given = hidden.is_leaf and hidden.requires_grad  # by a caller; autograd refuses to change it
    total = hidden + bias if given else hidden.add_(bias)
    if not torch.is_grad_enabled() or not (total.requires_grad or weight.requires_grad):
        return matmul(torch.ops.aten.gelu_(total), weight)
    product: Tensor = _GeluLinear.apply(total, weight)
    return product


class _GeluLinear(torch.autograd.Function):
    """gelu(x) @ weight.T, keeping x; backward, the gradient of GELU takes the memory of GELU made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(F.gelu(x), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_needed, weight_needed = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            activated = F.gelu(rows)
            if weight_needed:
                grad_weight = grad.T @ activated
            if x_needed:
                grad_x = torch.mm(grad, weight, out=activated)
                torch.ops.aten.gelu_backward.grad_input(grad_x, rows, grad_input=grad_x)
                grad_x = grad_x.view(x.shape)
        return grad_x, grad_weight


def launch_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    recompute: Callable[..., Tensor] | None = None,
    *sources: Tensor,
) -> Tensor:
    """The kernel form of `mlp` without dropout, for inputs that `in_epilogue` has accepted.

    Args:
        recompute, sources: as for `linear_recomputing`: x == recompute(*sources) is not kept for the backward
            pass; under torch.compile it is.
    """
    weight1, weight2 = weight1.to(x.dtype), weight2.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    inputs = rows, weight1, bias1, weight2
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if recompute is None or not trained or torch.compiler.is_compiling():
        product, _ = _mlp(*inputs, trained)
    else:
        product = _RecomputingMlp.apply(*inputs, recompute, *sources)
    return product.view(*x.shape[:-1], len(weight2))


@torch.library.custom_op("lmim_fast::mlp", mutates_args=())
def _mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    """Product (M, D2), and x @ weight1.T + bias1 (M, F) where it is kept for the backward pass, else (0,)."""
    from lmim_fast.kernels import linear_gelu

    hidden, activated = linear_gelu.forward(x, weight1, bias1, keep_hidden=keep_hidden)
    with torch.autocast(x.device.type, enabled=False):
        product = F.linear(activated, weight2)
    return product, x.new_empty(0) if hidden is None else hidden


@_mlp.register_fake
def _(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, keep_hidden: bool) -> tuple[Tensor, Tensor]:
    hidden = x.new_empty(len(x), len(weight1)) if keep_hidden else x.new_empty(0)
    return x.new_empty(len(x), len(weight2)), hidden


@torch.library.custom_op("lmim_fast::mlp_backward", mutates_args=())
def _mlp_backward(
    grad: Tensor, bias1: Tensor, weight2: Tensor, hidden: Tensor, bias_wanted: bool, weight_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the hidden rows (M, F), and of bias1 and weight2; one that is not wanted is empty."""
    from lmim_fast.kernels import linear_gelu

    grad_hidden, activated, sums = linear_gelu.backward(
        grad, weight2, hidden, activated_wanted=weight_wanted, bias_wanted=bias_wanted
    )
    with torch.autocast(grad.device.type, enabled=False):
        grad_weight2 = grad.new_empty(0) if activated is None else grad.T @ activated
    grad_bias1 = bias1.new_empty(0) if sums is None else sums.to(bias1.dtype)
    return grad_hidden, grad_bias1, grad_weight2


@_mlp_backward.register_fake
def _(
    grad: Tensor, bias1: Tensor, weight2: Tensor, hidden: Tensor, bias_wanted: bool, weight_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape),
        bias1.new_empty(bias1.shape if bias_wanted else 0),
        grad.new_empty(weight2.shape if weight_wanted else 0),
    )


def _gradients(
    grad: Tensor,
    rows: Callable[[], Tensor],
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    hidden: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight1, bias1 and weight2, None for those that are not needed; rows() gives x (M, D).

    rows() is called when the activated hidden rows are free again.
    """
    x_needed, weight1_needed, bias1_needed, weight2_needed = needed
    with torch.autocast(grad.device.type, enabled=False):
        if not any(needed[:3]):
            return None, None, None, grad.T @ F.gelu(hidden)
        grad_hidden, grad_bias1, grad_weight2 = _mlp_backward(
            grad.contiguous(), bias1, weight2, hidden, bias1_needed, weight2_needed
        )
        grad_weight1 = grad_hidden.T @ rows() if weight1_needed else None
        grad_x = grad_hidden @ weight1 if x_needed else None
    return (
        grad_x,
        grad_weight1,
        grad_bias1 if bias1_needed else None,
        grad_weight2 if weight2_needed else None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4], output[1])


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:4]
    if grad is None or not any(needed):
        return (None,) * 5
    x, weight1, bias1, weight2, hidden = ctx.saved_tensors
    return *_gradients(grad, lambda: x, weight1, bias1, weight2, hidden, needed), None


_mlp.register_autograd(_backward, setup_context=_setup_context)


class _RecomputingMlp(torch.autograd.Function):
    """`_mlp` that keeps the sources of its rows in place of the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        recompute: Callable[..., Tensor],
        *sources: Tensor,
    ) -> Tensor:
        product, hidden = _mlp(x, weight1, bias1, weight2, True)
        ctx.recompute = recompute
        ctx.save_for_backward(weight1, bias1, weight2, hidden, *sources)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight1, bias1, weight2, hidden, *sources = ctx.saved_tensors

        def rows() -> Tensor:
            return ctx.recompute(*sources).reshape(-1, weight1.shape[1])

        needed = ctx.needs_input_grad[:4]
        gradients = _gradients(grad, rows, weight1, bias1, weight2, hidden, needed)
        return *gradients, None, *(None for _ in sources)


def _refuses(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> str | None:
    if weight1.numel() and weight2.numel():
        return None
    return f"has no kernel for empty weights, got {tuple(weight1.shape)} and {tuple(weight2.shape)}"


dispatch.register(
    "mlp",
    dispatch.Kernel(
        launch=launch_mlp, dtypes=(torch.float32, torch.bfloat16, torch.float16), refuses=_refuses
    ),
)
