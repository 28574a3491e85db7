"""What fast forms are made of: attention, MLP and pre-norm block over weights that were read from a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.layers.fast_forwards.form import Form
from lmim_fast.layers.fast_forwards.read import Linear, Norm, rows
from lmim_fast.layers.norm import fused_add_norm, norm_linear, norm_mlp
from lmim_fast.ops.attention import cross_attention, self_attention
from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.mlp import mlp
from lmim_fast.ops.norm import dropout_add_layer_norm

MOST_PADDED_KEYS = 64  # that the attention kernel takes with key lengths


class Branch(NamedTuple):
    """What is still to be added to the residual stream, after its bias and dropout."""

    product: Tensor
    bias: Tensor | None
    p: float

    def finish(self) -> Tensor:
        """dropout(product + bias)."""
        bias = self.bias
        total = self.product if bias is None else self.product + bias.to(self.product.dtype)
        return F.dropout(total, self.p) if self.p else total


class Attention(NamedTuple):
    """Attention of D features."""

    qkv: Linear
    heads: int
    p: float  # dropout of the attention weights
    proj: Any = None  # Linear; None: the context is the result
    drop: float = 0.0  # dropout of the result
    q_norm: Any = None  # called with (B, H, N, d)
    k_norm: Any = None
    batch_first: bool = True

    @property
    def width(self) -> int:
        """D."""
        return self.qkv.weight.shape[1]

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """All that is read."""
        return *self.qkv, *(self.proj or ())

    def run(self, x: Tensor, causal: bool) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x = self.project(self.context(x, causal=causal))
        return F.dropout(x, self.drop) if self.drop else x

    def project(self, context: Tensor) -> Tensor:
        """Output projection of a context (B, N, D), if there is one; unlike that of nn.Linear no view."""
        if self.proj is None:
            return context
        rows = F.linear(context.flatten(0, 1), *self.proj)
        product: Tensor = torch.ops.aten._unsafe_view(rows, [*context.shape[:-1], rows.shape[-1]])
        return product

    def branch(self, x: Tensor, **options: Any) -> Branch:
        """Of the residual stream; options as for `context`."""
        return Branch(linear(self.context(x, **options), self.proj.weight), self.proj.bias, self.drop)

    def context(
        self,
        x: Tensor,
        memory: tuple[Tensor, Tensor] | None = None,
        *,
        causal: bool = False,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Context (B, N, D), or (N, B, D).

        Args:
            memory:  keys and values (B, M, D); None: x itself.
            causal:  no key behind the query is seen; only for x itself.
            padding: (B, M), True for hidden keys. The context is zeros where all are.
        """
        if self.q_norm is not None or self.k_norm is not None:
            return self._normed(x, causal)
        if not self.batch_first:
            x = x.transpose(0, 1)
            memory = None if memory is None else (memory[0].transpose(0, 1), memory[1].transpose(0, 1))
        if memory is None and padding is None:
            x = x.to(compute_dtype(self.qkv.weight))
            product, segments = linear(x, self.qkv.weight).flatten(0, 1), [(x.shape[0], x.shape[1])]
            context = self_attention(product, self.qkv.bias, self.heads, segments, p=self.p, causal=causal)
            context = context.view(*x.shape[:2], -1)
        else:
            context = self._over(x, *(memory or (x, x)), padding)
        return context if self.batch_first else context.transpose(0, 1)

    def _over(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        """Context over a memory. Attention does not depend on the order of the keys: those that are seen are
        moved to the front, so that their number says the rest."""
        (weight, bias), width = self.qkv, self.width
        dtype = compute_dtype(weight)
        q = linear(query.to(dtype), weight[:width])
        if key is value:
            kv = linear(key.to(dtype), weight[width:])
        else:
            k = linear(key.to(dtype), weight[width : 2 * width])
            kv = torch.cat([k, linear(value.to(dtype), weight[2 * width :])], -1)
        lengths = None
        if padding is not None:
            order = padding.to(torch.uint8).argsort(dim=1, stable=True)
            kv = kv.gather(1, order[:, :, None].expand_as(kv))
            lengths = padding.shape[1] - padding.sum(1)
        q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        return cross_attention(q, q_bias, kv, kv_bias, self.heads, p=self.p, key_lengths=lengths)

    def _normed(self, x: Tensor, causal: bool) -> Tensor:
        """Context of self-attention with norms of queries and keys."""
        qkv = F.linear(x, *self.qkv).view(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast's norms are in fp32
        context = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=causal)
        return context.transpose(1, 2).flatten(2)


class Mlp(NamedTuple):
    """Two linears."""

    first: Linear
    act: Callable[[Tensor], Tensor] | None  # None: exact GELU
    p: float  # dropout of the hidden values
    second: Linear
    drop: float  # dropout of the result

    @property
    def width(self) -> int:
        """D."""
        return self.first.weight.shape[1]

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """All that is read."""
        return *self.first, *self.second

    def run(self, x: Tensor, causal: bool = False) -> Tensor:
        """(..., D) to (..., D')."""
        return self.branch(x).finish()

    def branch(self, x: Tensor) -> Branch:
        """Of the residual stream."""
        weight, bias = self.first
        if self.act is None:
            assert bias is not None
            product = mlp(x.to(compute_dtype(weight)), weight, bias, self.second.weight, p=self.p)
        else:
            hidden = F.dropout(self.act(F.linear(x, weight, bias)), self.p)
            product = linear(hidden.to(compute_dtype(self.second.weight)), self.second.weight)
        return Branch(product, self.second.bias, self.drop)


class Block(NamedTuple):
    """x + path1(attention(norm1(x))), then the same of norm2 and the MLP."""

    norm1: Norm
    attention: Attention
    path1: Callable[[Tensor], Tensor] | None  # called with the branch (B, N, D), after its dropout
    norm2: Norm
    mlp: Mlp
    path2: Callable[[Tensor], Tensor] | None

    @property
    def width(self) -> int:
        """D."""
        return self.attention.width

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """All that is read."""
        return *self.norm1[:2], *self.attention.weights, *self.norm2[:2], *self.mlp.weights

    def run(self, x: Tensor, causal: bool) -> Tensor:
        """(B, N, D) to (B, N, D) in x's dtype, no view."""
        attention, parts, shape, residual = self.attention, self.mlp, x.shape, x.flatten(0, 1)
        qkv, heads, p = attention.qkv, attention.heads, attention.p
        if attention.q_norm is None and attention.k_norm is None:
            product, residual = norm_linear(residual, None, None, self.norm1, qkv.weight)
            context = self_attention(product, qkv.bias, heads, [(shape[0], shape[1])], p=p, causal=causal)
        else:
            rows, residual = fused_add_norm(residual, None, None, self.norm1, compute_dtype(qkv.weight))
            context = attention.context(rows.view(shape), causal=causal).flatten(0, 1)
        branch = Branch(linear(context, attention.proj.weight), attention.proj.bias, attention.drop)
        product, bias, p = _along(self.path1, branch, shape)
        if parts.act is None:
            product, residual = norm_mlp(
                residual, product, bias, self.norm2, parts.first, parts.second, p=p, drop=parts.p
            )
            branch = Branch(product, parts.second.bias, parts.drop)
        else:
            dtype = compute_dtype(parts.first.weight)
            rows, residual = fused_add_norm(residual, product, bias, self.norm2, dtype, p=p)
            branch = parts.branch(rows.view(shape))
        branch = _along(self.path2, branch, shape)
        return add_branch(residual.view(shape), branch._replace(product=branch.product.view(shape)))


def sublayer_form(
    reader: Callable[[Any], Attention | Mlp | Block],
    options: Callable[..., bool],
    result: Callable[[Tensor], Any] | None = None,
) -> Form:
    """The form of a layer of one input.

    Args:
        reader:  of the layer.
        options: called with the layer and all that it is called with beside the input; whether it is causal.
        result:  of the layer, from that of what is read; None: that itself.
    """

    def run(self: Any, x: Tensor, /, *more: object, **named: object) -> Any:
        causal, sublayer = options(self, *more, **named), reader(self)
        rows(sublayer.width, x, weights=sublayer.weights, dims=None if isinstance(sublayer, Mlp) else 3)
        return sublayer.run(x, causal) if result is None else result(sublayer.run(x, causal))

    return Form(reader, run)


def _along(path: Callable[[Tensor], Tensor] | None, branch: Branch, shape: torch.Size) -> Branch:
    """The branch after its path."""
    return branch if path is None else Branch(path(branch.finish().view(shape)).flatten(0, 1), None, 0.0)


def add_branch(residual: Tensor, branch: Branch) -> Tensor:
    """residual + dropout(product + bias) in the residual's dtype."""
    return residual + branch.finish().to(residual.dtype)


def add_post_norm(branch: Branch, residual: Tensor, norm: Norm) -> Tensor:
    """Norm of residual + dropout(product + bias), in the dtype that torch gives."""
    product = branch.product.to(norm_dtype(residual))
    weights = residual, norm.weight, norm.bias
    return dropout_add_layer_norm(product, branch.bias, *weights, p=branch.p, eps=norm.eps)[0]


def norm_dtype(x: Tensor) -> torch.dtype:
    """Dtype of torch's LayerNorm of x: CUDA's autocast runs it in fp32, that of other devices leaves it."""
    on_cuda = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.float32 if on_cuda else x.dtype
