"""MLP with exact GELU, in the epilogues of its products or in a separate pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops import dispatch, dropout, gelu, sublayers
from lmim_fast.ops.epilogue import in_epilogue
from lmim_fast.ops.gelu import bias_gelu
from lmim_fast.ops.linear import linear, linear_recomputing
from lmim_fast.ops.operators import mlp as operators
from lmim_fast.ops.operators.operator import differentiable, direct
from lmim_fast.ops.products import matmul, without_autocast
from lmim_fast.ops.transforms import by_autograd, ordinary, transformed


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
    inside = not p and in_epilogue(epilogue, x, weight1, bias1, weight2)
    if inside or takes_rows(x, weight1, bias1, weight2):
        return launch_mlp(x, weight1, bias1, weight2, p=p, epilogue=inside)
    return gelu_linear(linear(x, weight1), bias1, weight2, p=p)


def takes_rows(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> bool:
    """True if `launch_mlp` runs on rows x (..., D) with GELU in a separate pass."""
    return direct(x, weight1, bias1, weight2) and gelu.takes(bias1, x.dtype)


def launch_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *, p: float = 0.0, epilogue: bool = True
) -> Tensor:
    """`mlp` by kernels, for inputs that `in_epilogue` or `takes_rows` has accepted."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    tensors = rows, weight1, bias1, weight2
    if direct(*tensors):
        seed = dropout.settled_seed(p, None, x.device)
        product = sublayers.mlp(*tensors, seed=seed, p=p, epilogue=epilogue)
    else:
        assert epilogue, "traced rows with GELU in a separate pass are other ops"
        weight1, weight2 = weight1.to(x.dtype), weight2.to(x.dtype)
        product = operators.mlp(rows, weight1, bias1, weight2, differentiable(*tensors))[0]
    return product if x.dim() == 2 else product.view(*x.shape[:-1], len(weight2))


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
    if p or transformed():
        return linear(bias_gelu(hidden, bias, p=p), weight)
    if torch.compiler.is_compiling() or gelu.takes(bias, hidden.dtype):
        return linear_recomputing(bias_gelu(hidden, bias), weight, bias_gelu, hidden, bias)
    bias, weight = bias.to(hidden.dtype), weight.to(hidden.dtype)
    owner = hidden if hidden._base is None else hidden._base
    given = owner.is_leaf and owner.requires_grad  # by a caller; autograd refuses to change it
    total = hidden + bias if given else hidden.add_(bias)
    if not torch.is_grad_enabled() or not (total.requires_grad or weight.requires_grad):
        return matmul(torch.ops.aten.gelu_(total), weight)
    product: Tensor = _GeluLinear.apply(total, weight)
    return product


def _plain_gelu_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.gelu(x), weight)


class _GeluLinear(torch.autograd.Function):
    """gelu(x) @ weight.T, keeping x; backward, the gradient of GELU takes the memory of GELU made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(F.gelu(x), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        if not ordinary(grad):
            of_x, of_weight = by_autograd(_plain_gelu_linear, (x, weight), ctx.needs_input_grad, (grad,))
            return of_x, of_weight
        x_needed, weight_needed = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        grad_x = grad_weight = None
        with without_autocast(x.device):
            activated = F.gelu(rows)
            if weight_needed:
                grad_weight = grad.T @ activated
            if x_needed:
                grad_x = torch.mm(grad, weight, out=activated)
                torch.ops.aten.gelu_backward.grad_input(grad_x, rows, grad_input=grad_x)
                grad_x = grad_x.view(x.shape)
        return grad_x, grad_weight
