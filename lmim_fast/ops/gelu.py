"""Bias, exact GELU and dropout in one op."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops import dispatch, dropout


def bias_gelu(x: Tensor, bias: Tensor, *, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """dropout(gelu(x + bias)) with the exact (erf) GELU. Keeps only x for the backward pass.

    Args:
        x:    (..., F) product without its bias, fp32 | bf16 | fp16.
        bias: (F,); its gradient comes out of this op.
        p:    dropout probability.
        seed: one int64 that fixes the mask; without it torch's generator does.
    Returns:
        (..., F) in x's dtype.
    Raises:
        ValueError: bias is not (F,), an input is not floating-point, inputs are on several devices, p is
            outside [0, 1), or seed is not one int64.
    Source: Hendrycks and Gimpel 2016.
    """
    check(x, bias)
    dropout.check_probability(p)
    dropout.check_seed(seed)
    dispatch.same_device(x=x, seed=seed)
    return dispatch.run("bias_gelu", _eager, x, bias, p, seed)


def check(x: Tensor, bias: Tensor) -> None:
    """Raise ValueError where bias is not as wide as x, one is not floating-point, or their devices differ."""
    if x.dim() == 0 or bias.shape != x.shape[-1:]:
        raise ValueError(f"bias {tuple(bias.shape)} must be as wide as x {tuple(x.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    dispatch.same_device(x=x, bias=bias)


def _eager(x: Tensor, bias: Tensor, p: float, seed: Tensor | None) -> Tensor:
    bias = bias.to(x.dtype)
    # A compiler plans memory itself, and that of PyTorch 2.11 would lose the gradient of a result in place.
    activated = F.gelu(x + bias) if torch.compiler.is_compiling() else _BiasGelu.apply(x, bias)
    return dropout.dropout(activated, p, seed)


class _BiasGelu(torch.autograd.Function):
    """Keeps only x: the sum with the bias is made again for backward. Results take the sum's memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        result: Tensor = torch.ops.aten.gelu_(x + bias)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        total = x + bias
        grad_x = torch.ops.aten.gelu_backward.grad_input(grad, total, grad_input=total)
        return grad_x, grad_x.reshape(-1, bias.shape[0]).sum(0)


@torch.library.custom_op("lmim_fast::bias_gelu", mutates_args=())
def _forward(x: Tensor, bias: Tensor, seed: Tensor | None, p: float) -> Tensor:
    from lmim_fast.kernels import gelu

    return gelu.forward(x, bias, seed, dropout.threshold(p))


@_forward.register_fake
def _(x, bias, seed, p):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("lmim_fast::bias_gelu_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, bias: Tensor, seed: Tensor | None, p: float, bias_wanted: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the bias, which is empty where it is not wanted."""
    from lmim_fast.kernels import gelu

    grad_x, grad_bias = gelu.backward(grad, x, bias, seed, dropout.threshold(p), bias_wanted=bias_wanted)
    return grad_x, bias.new_empty(0) if grad_bias is None else grad_bias.to(bias.dtype)


@_backward.register_fake
def _(grad, x, bias, seed, p, bias_wanted):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), bias.new_empty(bias.shape if bias_wanted else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, seed, p = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bias, seed)
    ctx.p = p


def _differentiate(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    x_wanted, bias_wanted = ctx.needs_input_grad[:2]
    x, bias, seed = ctx.saved_tensors
    grad_x, grad_bias = _backward(grad, x, bias, seed, ctx.p, bias_wanted)
    return grad_x if x_wanted else None, grad_bias if bias_wanted else None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _launch(x: Tensor, bias: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if p == 0:
        seed = None
    elif seed is None:
        seed = dropout.draw_seed(x.device)
    output: Tensor = _forward(x, bias, seed, p)
    return output


def _refuses(x: Tensor, *_: Any) -> str | None:
    return None if x.shape[-1] else "takes rows of at least 1 value, got 0"


dispatch.register(
    "bias_gelu",
    dispatch.Kernel(launch=_launch, dtypes=(torch.float32, torch.bfloat16, torch.float16), refuses=_refuses),
)
