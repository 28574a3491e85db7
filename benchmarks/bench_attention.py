"""Self-attention of the encoders and the decoder, cross-attention of the decoder, against PyTorch's backends.

"eager" spells the softmax out; "compiled" is that under torch.compile; "sdpa" is PyTorch's own choice, which
"compiled sdpa" and "compiled cudnn" fuse with what surrounds it: the strongest plain PyTorch.

Ours, "eager" and "compiled" add the bias of the product before them. The others get it for nothing, as if it
were in that product's epilogue: their forward pass does not add it (so their values are other ones, the work
is the same), and its gradient is a column sum, as in the backward pass of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import floors
from benchmarks.harness import DEVICE, Operation, Unavailable, measure, seconds_a_call
from benchmarks.shapes import DECODER, MASKED, MODELS, SMALL
from lmim_fast.ops import attention_backends
from lmim_fast.ops.attention import cross_attention, self_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
VARIANTS = ("ours", "eager", "compiled", "sdpa", "compiled sdpa", *BACKENDS, "compiled cudnn", "flash_attn")
pytestmark = pytest.mark.benchmark(timer=seconds_a_call)

AddBias = Callable[[Tensor, Tensor], Tensor]  # (..., D), (D,)
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # (B, N, H, d), (B, M, H, d) twice, p


def test_attention(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    measure(benchmark, operation, direction, variant)


def operations(batch: int) -> Iterator[Operation]:
    for model in MODELS:
        for tokens in model.tokens:
            for p in model.dropouts:
                yield _self_attention(model.name, batch, tokens, model.width, model.heads, p)
    for queries in (MASKED, DECODER.tokens[0]):
        for p in DECODER.dropouts:
            yield _cross_attention(batch, queries, DECODER.tokens[0], DECODER.width, DECODER.heads, p)


def _self_attention(model: str, batch: int, tokens: int, width: int, heads: int, p: float) -> Operation:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        qkv = torch.randn(batch * tokens, 3 * width, device=device, dtype=dtype)
        return qkv.requires_grad_(), torch.randn(3 * width, device=device).requires_grad_()

    def ours(qkv: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
        return self_attention(qkv, bias, heads, [(batch, tokens)], p=p, seed=seed)

    def plain(add_bias: AddBias, attend: Attend, qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = add_bias(qkv, bias).view(batch, tokens, 3, heads, -1).unbind(2)
        return attend(q, k, v, p).reshape(batch * tokens, width)

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.attention(batch, tokens, tokens, width, heads, itemsize)

    sizes = dict(model=model, batch=batch, tokens=tokens, memory=tokens, width=width, heads=heads, p=p)
    return _operation("self_attention", sizes, inputs, ours, plain, passes)


def _cross_attention(batch: int, queries: int, memory: int, width: int, heads: int, p: float) -> Operation:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        q = torch.randn(batch, queries, width, device=device, dtype=dtype)
        kv = torch.randn(batch, memory, 2 * width, device=device, dtype=dtype)
        biases = (torch.randn(count * width, device=device) for count in (1, 2))
        return tuple(tensor.requires_grad_() for tensor in (q, kv, *biases))

    def ours(q: Tensor, kv: Tensor, q_bias: Tensor, kv_bias: Tensor, seed: Tensor | None = None) -> Tensor:
        return cross_attention(q, q_bias, kv, kv_bias, heads, p=p, seed=seed)

    def plain(
        add_bias: AddBias, attend: Attend, q: Tensor, kv: Tensor, q_bias: Tensor, kv_bias: Tensor
    ) -> Tensor:
        q = add_bias(q, q_bias).view(batch, queries, heads, -1)
        k, v = add_bias(kv, kv_bias).view(batch, memory, 2, heads, -1).unbind(2)
        return attend(q, k, v, p).reshape(batch, queries, width)

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.attention(batch, queries, memory, width, heads, itemsize)

    sizes = dict(
        model=DECODER.name, batch=batch, tokens=queries, memory=memory, width=width, heads=heads, p=p
    )
    return _operation("cross_attention", sizes, inputs, ours, plain, passes)


def _operation(
    name: str,
    sizes: dict[str, Any],
    inputs: Callable[..., tuple[Tensor, ...]],
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    passes: Callable[..., floors.Passes],
) -> Operation:
    others: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]
    rivals: dict[str, Attend] = {"sdpa": _sdpa, "flash_attn": _flash_attn}
    rivals |= {key: partial(_sdpa_of, backend) for key, backend in BACKENDS.items()}
    others = {key: partial(plain, _in_product, attend) for key, attend in rivals.items()}
    leading = sizes["model"] == SMALL.name and sizes["tokens"] == 257
    eager = partial(plain, _added, _softmax)
    return Operation(name, sizes, inputs, eager, {"ours": ours}, passes, others, leading=leading)


def _added(x: Tensor, bias: Tensor) -> Tensor:
    return x + bias.to(x.dtype)


def _in_product(x: Tensor, bias: Tensor) -> Tensor:
    result: Tensor = _BiasInProduct.apply(x, bias)
    return result


class _BiasInProduct(torch.autograd.Function):
    """A bias that the product which made x has added at no cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.flatten(0, -2).sum(0).to(ctx.dtype)


def _softmax(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    return (F.dropout(weights, p) @ v).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2)


def _sdpa_of(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    if DEVICE.type != "cuda":
        raise Unavailable("PyTorch has this backend for CUDA devices alone")
    with sdpa_kernel(backend):
        return _sdpa(q, k, v, p)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    if DEVICE.type != "cuda":
        raise Unavailable("flash-attn needs a CUDA device")
    try:
        return attention_backends.flash(q, k, v, p)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error
