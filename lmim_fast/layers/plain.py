"""A few rows on a CPU: the drop-in layers by PyTorch's own ops, which cost the host least there.

No kernel runs, no product is large enough to be faster in another form, and no memory is worth saving.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.ops import attention_backends, dispatch
from lmim_fast.ops.norm import layer_norm

MOST_ROWS = 256  # below it no product of `ops.products` runs as a convolution


def has_few_rows(x: object) -> bool:
    """True for a tensor on a CPU with fewer rows than `MOST_ROWS`; no backend or autocast is asked for.

    Not where shapes are traced. It runs at every call of a layer, and so calls little.
    """
    if type(x) is not Tensor or x.is_nested or not x.dim() or torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() or x.numel() >= MOST_ROWS * x.shape[-1] or not x.is_cpu:
        return False
    return not (
        torch.is_autocast_enabled("cpu") or dispatch.is_asked_for() or attention_backends.is_asked_for()
    )


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """True where `has_few_rows` and x (B, N, D) fits the first weight (F, D) that it meets, and its dtype."""
    return (
        has_few_rows(x)
        and x.dim() == 3
        and x.shape[2] == weight.shape[1]
        and x.numel() > 0
        and x.dtype == weight.dtype
        and weight.is_cpu
    )


def self_attention(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, p: float) -> Tensor:
    """Context (B, N, D) of x (B, N, D) by the input projection (3D, D)."""
    batch, tokens, _ = x.shape
    qkv = linear(x, weight, bias).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)


def cross_attention(
    x: Tensor, memory: Tensor, weight: Tensor, bias: Tensor | None, heads: int, p: float
) -> Tensor:
    """Context (B, N, D) of x over a memory (B, M, D)."""
    batch, width = len(x), x.shape[2]
    sizes = [width, 2 * width]
    q_weight, kv_weight = weight.split(sizes)
    q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
    q = linear(x, q_weight, q_bias).view(batch, -1, heads, width // heads).transpose(1, 2)
    kv = linear(memory, kv_weight, kv_bias).view(batch, -1, 2, heads, width // heads)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)


def mlp(x: Tensor, first: nn.Linear, second: nn.Linear, p: float) -> Tensor:
    """(..., D): linear, GELU, dropout, linear."""
    x = F.gelu(linear(x, first.weight, first.bias))
    return linear(F.dropout(x, p) if p else x, second.weight, second.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in x's dtype, whatever theirs is."""
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    return F.linear(x, weight, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))


def norm(x: Tensor, module: Any) -> Tensor:
    """LayerNorm over the last dimension, by the weight, bias and eps of a module."""
    weight, bias = module.weight, module.bias
    if weight.dtype == x.dtype == bias.dtype:
        return F.layer_norm(x, x.shape[-1:], weight, bias, module.eps)
    return layer_norm(x, weight, bias, x.dtype, eps=module.eps)


def dropped(x: Tensor, p: float) -> Tensor:
    """Dropout."""
    return F.dropout(x, p) if p else x
