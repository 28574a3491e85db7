"""Layers by PyTorch's own ops: for a few rows on a CPU, where they cost the host least, and for parts that
are called because they are no longer plain (`layers/parts.py`).

With a few rows, or on one thread, no other form is faster on a CPU. From `MOST_ROWS` rows on, two threads run
the layers' own forms 1.0 to 1.2x as fast in training and 1.2 to 2.2x without gradients (measured in fp32,
widths of 128 to 768).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers.parts import hooks_on_all, is_biased_linear, is_linear, is_norm
from lmim_fast.ops import attention, attention_backends, dispatch
from lmim_fast.ops.attention import Segment
from lmim_fast.ops.linear import linear as matmul
from lmim_fast.ops.norm import layer_norm

MOST_ROWS = 1024  # the own forms are 0.98 to 1.7x as fast with 520 rows, 0.9 to 1.6x with 260
_unsafe_view = torch.ops.aten._unsafe_view.default  # for autograd, no view


def has_few_rows(x: object) -> bool:
    """True for a tensor on a CPU of fewer than `MOST_ROWS` rows, or of any number for one thread.

    Not where a backend is asked for, under autocast, nor where shapes are traced. It runs at every call of a
    layer, and so calls little.
    """
    if type(x) is not Tensor or x.is_nested or not x.dim() or torch.compiler.is_compiling():
        return False
    many = x.numel() >= MOST_ROWS * x.shape[-1] and torch.get_num_threads() > 1
    if torch._C._get_tracing_state() or many or not x.is_cpu:
        return False
    return not (
        torch.is_autocast_enabled("cpu") or dispatch.is_asked_for() or attention_backends.is_asked_for()
    )


def fits(x: Tensor, weight: Tensor | None) -> bool:
    """True where `has_few_rows` and x (B, N, D) fits the first weight (F, D) that it meets, and its dtype.

    False for None: a part that has taken a linear's place may have no weight.
    """
    return (
        weight is not None
        and has_few_rows(x)
        and x.dim() == 3
        and x.shape[2] == weight.shape[1]
        and x.numel() > 0
        and x.dtype == weight.dtype
        and weight.is_cpu
    )


def linear(x: Tensor, part: nn.Module, *, last: bool = False) -> Tensor:
    """part(x); a plain linear computes in x's dtype, whatever that of its parameters is.

    Args:
        x:    (..., D).
        part: a linear, or what has taken its place.
        last: the result is that of a layer, and so no view, as that of `F.linear` with a bias is.
    """
    if hooks_on_all() or not is_linear(part):
        result: Tensor = part(x)
        return result
    parameters = part._parameters
    weight, bias = cast(Tensor, parameters["weight"]), parameters["bias"]
    if not last or bias is None:
        return project(x, weight, bias)
    if x.is_cpu:
        product = project(x, weight, None)
        return product + bias.to(product.dtype)
    product = project(x, weight, bias)
    return _unsafe_view(product, product.shape)  # which would cost a CPU more than another sum


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in x's dtype, whatever theirs is."""
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    return F.linear(x, weight, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))


def product_and_bias(x: Tensor, part: nn.Module) -> tuple[Tensor, Tensor]:
    """x @ weight.T of a plain linear in x's dtype, and its bias (F,), still to be added.

    Of another part its result in x's dtype, and a bias of zeros.
    """
    if is_biased_linear(part) and not hooks_on_all():
        return matmul(x, part.weight), part.bias
    product = part(x).to(x.dtype)
    return product, product.new_zeros(product.shape[-1])


def norm(x: Tensor, part: nn.Module) -> Tensor:
    """part(x); a plain LayerNorm returns x's dtype, whatever that of its parameters is."""
    weight = part._parameters.get("weight")
    if weight is not None and weight.dtype != x.dtype and is_norm(part) and not hooks_on_all():
        return layer_norm(x, part.weight, part.bias, x.dtype, eps=part.eps)
    result: Tensor = part(x)
    return result


def mlp(x: Tensor, first: nn.Module, second: nn.Module, p: float, *, last: bool = False) -> Tensor:
    """(..., D): linear, GELU, dropout, linear."""
    return linear(dropped(F.gelu(linear(x, first)), p), second, last=last)


def dropped(x: Tensor, p: float) -> Tensor:
    """Dropout."""
    return F.dropout(x, p) if p else x


def self_attention(qkv: Tensor, heads: int, segments: Sequence[Segment] | None, p: float) -> Tensor:
    """Context (..., D) of qkv (..., 3D), which has its bias.

    Args:
        segments: of the flattened rows; None: they are few, and qkv is (B, N, 3D).
    """
    if segments is not None:
        context = attention.self_attention(qkv.flatten(0, -2), None, heads, segments, p=p)
        return context.view(*qkv.shape[:-1], -1)
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)


def attend_self(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, p: float) -> Tensor:
    """Context (B, N, D) of a few rows x (B, N, D) by the input projection (3D, D)."""
    return self_attention(project(x, weight, bias), heads, None, p)


def attend_memory(
    x: Tensor, memory: Tensor, weight: Tensor, bias: Tensor | None, heads: int, p: float
) -> Tensor:
    """Context (B, N, D) of x (B, N, D) over a memory (B, M, D), both of a few rows."""
    batch, width = len(x), x.shape[2]
    sizes = [width, 2 * width]
    q_weight, kv_weight = weight.split(sizes)
    q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
    q = project(x, q_weight, q_bias).view(batch, -1, heads, width // heads).transpose(1, 2)
    kv = project(memory, kv_weight, kv_bias).view(batch, -1, 2, heads, width // heads)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)


def each(part: nn.Module, rows: Tensor, segments: Sequence[Segment]) -> Tensor:
    """A part of sequences (B, N, D), called once for each segment of rows (rows, D): (rows, D)."""
    pieces = rows.split([batch * tokens for batch, tokens in segments])
    results = [
        part(piece.unflatten(0, segment)).flatten(0, 1)
        for piece, segment in zip(pieces, segments, strict=True)
    ]
    return results[0] if len(results) == 1 else torch.cat(results)
