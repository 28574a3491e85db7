"""Queries, keys and values of packed rows, as attention that is not this package's kernel takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmim_fast.ops.transforms import ordinary, transformed

Heads = tuple[Tensor, Tensor, Tensor]


def split_heads(
    qkv: Tensor, bias: Tensor | None, heads: int, segments: Sequence[tuple[int, int]]
) -> list[Heads]:
    """Views of qkv + bias for each segment; backward writes their gradients into one matrix, once.

    By slices autograd would stack the three gradients of each segment, and then put the segments together.

    Args:
        qkv:      (rows, 3D).
        bias:     (3D,) in qkv's dtype, or None.
        heads:    H.
        segments: (sequences, tokens) of each group of rows.
    Returns:
        q, k, v of each segment: (sequences, tokens, H, D / H).
    """
    plain = torch.compiler.is_compiling() or transformed() or not torch.is_grad_enabled()
    if plain or bias is None:
        return _views(qkv if bias is None else qkv + bias, heads, segments)
    return _triples(_SplitHeads.apply(qkv, bias, heads, segments))


def _views(rows: Tensor, heads: int, segments: Sequence[tuple[int, int]]) -> list[Heads]:
    parts = rows.split([sequences * tokens for sequences, tokens in segments])
    views, features = [], rows.shape[1] // (3 * heads)
    for part, segment in zip(parts, segments, strict=True):
        q, k, v = part.view(*segment, 3, heads, features).unbind(2)
        views.append((q, k, v))
    return views


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor, heads: int, segments: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, ...]:
        ctx.heads, ctx.segments = heads, segments
        return tuple(view for views in _views(qkv + bias, heads, segments) for view in views)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ordinary(*grads):
            width = 3 * grads[0].shape[2] * grads[0].shape[3]
            parts = [torch.stack(part, 2).reshape(-1, width) for part in _triples(grads)]
            grad = torch.cat(parts)
        else:
            rows = sum(sequences * tokens for sequences, tokens in ctx.segments)
            grad = grads[0].new_empty(rows, 3 * grads[0].shape[2] * grads[0].shape[3])
            for target, part in zip(_views(grad, ctx.heads, ctx.segments), _triples(grads), strict=True):
                for view, value in zip(target, part, strict=True):
                    view.copy_(value)
        return grad, grad.sum(0) if ctx.needs_input_grad[1] else None, None, None


def _triples(tensors: Sequence[Tensor]) -> list[Heads]:
    return [(tensors[first], tensors[first + 1], tensors[first + 2]) for first in range(0, len(tensors), 3)]
