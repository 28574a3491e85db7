"""The steps that fast forms are made of, over weights that were read from a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.layers.fast_forwards.read import Linear, Norm
from lmim_fast.layers.norm import fused_add_norm, norm_linear, norm_mlp
from lmim_fast.ops.attention import cross_attention, self_attention
from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.mlp import mlp
from lmim_fast.ops.norm import dropout_add_layer_norm

MOST_PADDED_KEYS = 64  # that the attention kernel takes with key lengths


class Attention(NamedTuple):
    """Self-attention of a ViT."""

    qkv: Linear
    heads: int
    p: float  # dropout of the attention weights
    proj: Linear
    drop: float  # dropout of the result
    q_norm: Any = None  # called with (B, H, N, d)
    k_norm: Any = None

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """All that is read."""
        return *self.qkv, *self.proj


class Mlp(NamedTuple):
    """Two linears."""

    first: Linear
    act: Callable[[Tensor], Tensor] | None  # None: exact GELU
    p: float  # dropout of the hidden values
    second: Linear
    drop: float  # dropout of the result

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """All that is read."""
        return *self.first, *self.second


class Branch(NamedTuple):
    """What is still to be added to the residual stream, after its bias and dropout."""

    product: Tensor
    bias: Tensor | None
    p: float


def attend(
    x: Tensor,
    qkv: Linear,
    heads: int,
    p: float,
    *,
    causal: bool = False,
    padding: Tensor | None = None,
    batch_first: bool = True,
) -> Tensor:
    """Context (B, N, D), or (N, B, D), of self-attention over x; padding (B, N) is True for hidden keys."""
    if padding is not None:
        return attend_memory(x, x, x, qkv, heads, p, padding=padding, batch_first=batch_first)
    x = (x if batch_first else x.transpose(0, 1)).to(compute_dtype(qkv.weight))
    product = linear(x, qkv.weight).flatten(0, 1)
    context = self_attention(product, qkv.bias, heads, [(x.shape[0], x.shape[1])], p=p, causal=causal)
    context = context.view(*x.shape[:2], -1)
    return context if batch_first else context.transpose(0, 1)


def attend_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    qkv: Linear,
    heads: int,
    p: float,
    *,
    padding: Tensor | None = None,
    batch_first: bool = True,
) -> Tensor:
    """Context, in the layout of `query`, of attention over keys and values; padding (B, M) hides keys.

    Attention does not depend on the order of the keys: those that are seen are moved to the front, so that
    their number says the rest. The context is zeros where none is seen.
    """
    dtype, width, one = compute_dtype(qkv.weight), qkv.weight.shape[1], key is value
    if not batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    q = linear(query.to(dtype), qkv.weight[:width])
    if one:
        kv = linear(key.to(dtype), qkv.weight[width:])
    else:
        k = linear(key.to(dtype), qkv.weight[width : 2 * width])
        kv = torch.cat([k, linear(value.to(dtype), qkv.weight[2 * width :])], -1)
    lengths = None
    if padding is not None:
        order = padding.to(torch.uint8).argsort(dim=1, stable=True)
        kv = kv.gather(1, order[:, :, None].expand_as(kv))
        lengths = padding.shape[1] - padding.sum(1)
    q_bias, kv_bias = (None, None) if qkv.bias is None else (qkv.bias[:width], qkv.bias[width:])
    context = cross_attention(q, q_bias, kv, kv_bias, heads, p=p, key_lengths=lengths)
    return context if batch_first else context.transpose(0, 1)


def project(context: Tensor, layer: Linear) -> Tensor:
    """Linear of a context (B, N, D), with its bias. Unlike that of nn.Linear the result is no view."""
    rows = F.linear(context.flatten(0, 1), layer.weight, layer.bias)
    product: Tensor = torch.ops.aten._unsafe_view(rows, [*context.shape[:-1], rows.shape[-1]])
    return product


def feed_forward(x: Tensor, parts: Mlp) -> Tensor:
    """Product (..., D) of the second linear, without its bias."""
    if parts.act is None:
        weight, bias = parts.first
        assert bias is not None
        return mlp(x.to(compute_dtype(weight)), weight, bias, parts.second.weight, p=parts.p)
    hidden = F.dropout(parts.act(F.linear(x, *parts.first)), parts.p)
    return linear(hidden.to(compute_dtype(parts.second.weight)), parts.second.weight)


def pre_norm_block(
    x: Tensor,
    norm1: Norm,
    attention: Attention,
    path1: Callable[[Tensor], Tensor] | None,
    norm2: Norm,
    parts: Mlp,
    path2: Callable[[Tensor], Tensor] | None,
    *,
    causal: bool = False,
) -> Tensor:
    """x + path1(attention(norm1(x))), then the same of norm2 and the MLP.

    Args:
        x:     (B, N, D).
        path1: called with the branch (B, N, D), after its dropout; None: nothing is.
    Returns:
        (B, N, D) in x's dtype, no view.
    """
    shape, residual = x.shape, x.flatten(0, 1)
    segments = [(shape[0], shape[1])]
    if attention.q_norm is None and attention.k_norm is None:
        qkv, residual = norm_linear(residual, None, None, norm1, attention.qkv.weight)
        context = self_attention(
            qkv, attention.qkv.bias, attention.heads, segments, p=attention.p, causal=causal
        )
    else:
        rows, residual = fused_add_norm(residual, None, None, norm1, compute_dtype(attention.qkv.weight))
        context = attend_normed(rows.view(shape), attention, causal).flatten(0, 1)
    branch = Branch(linear(context, attention.proj.weight), attention.proj.bias, attention.drop)
    branch = _along(path1, branch, shape)
    if parts.act is None:
        product, residual = norm_mlp(
            residual, branch.product, branch.bias, norm2, parts.first, parts.second, p=branch.p, drop=parts.p
        )
    else:
        dtype = compute_dtype(parts.first.weight)
        rows, residual = fused_add_norm(residual, branch.product, branch.bias, norm2, dtype, p=branch.p)
        product = feed_forward(rows.view(shape), parts).flatten(0, 1)
    branch = _along(path2, Branch(product, parts.second.bias, parts.drop), shape)
    return add_branch(residual.view(shape), branch._replace(product=branch.product.view(shape)))


def _along(path: Callable[[Tensor], Tensor] | None, branch: Branch, shape: torch.Size) -> Branch:
    """The branch after its path."""
    if path is None:
        return branch
    return Branch(path(finish(branch).view(shape)).flatten(0, 1), None, 0.0)


def attend_normed(x: Tensor, attention: Attention, causal: bool) -> Tensor:
    """Context (B, N, D') of x (B, N, D), with norms of queries and keys."""
    heads = F.linear(x, *attention.qkv).view(*x.shape[:2], 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = heads.unbind(0)
    q = q if attention.q_norm is None else attention.q_norm(q)
    k = k if attention.k_norm is None else attention.k_norm(k)
    if q.dtype != v.dtype:  # autocast's norms are in fp32
        q, k = q.to(v.dtype), k.to(v.dtype)
    context = F.scaled_dot_product_attention(q, k, v, dropout_p=attention.p, is_causal=causal)
    return context.transpose(1, 2).flatten(2)


def finish(branch: Branch) -> Tensor:
    """dropout(product + bias)."""
    total = branch.product if branch.bias is None else branch.product + branch.bias.to(branch.product.dtype)
    return F.dropout(total, branch.p) if branch.p else total


def add_branch(residual: Tensor, branch: Branch) -> Tensor:
    """residual + dropout(product + bias) in the residual's dtype."""
    return residual + finish(branch).to(residual.dtype)


def add_post_norm(branch: Branch, residual: Tensor, norm: Norm) -> Tensor:
    """Norm of residual + dropout(product + bias), in the dtype that torch gives."""
    product = branch.product.to(norm_dtype(residual))
    weights = residual, norm.weight, norm.bias
    return dropout_add_layer_norm(product, branch.bias, *weights, p=branch.p, eps=norm.eps)[0]


def norm_dtype(x: Tensor) -> torch.dtype:
    """Dtype of torch's LayerNorm of x: CUDA's autocast runs it in fp32, that of other devices leaves it."""
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return x.dtype
