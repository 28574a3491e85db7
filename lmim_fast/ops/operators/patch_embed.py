"""Patch embedding by its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmim_fast import kernels
from lmim_fast.ops.operators.operator import cast, operator

View = tuple[Tensor, Tensor | None]


def _pair(images: Sequence[Tensor], ids: Sequence[Tensor], given: Sequence[bool]) -> list[View]:
    rest = iter(ids)
    return [(view, next(rest) if has_ids else None) for view, has_ids in zip(images, given, strict=True)]


def _rows(views: Sequence[View], every: int) -> list[int]:
    """Rows of each view in the result; `every` is 1 + L."""
    return [images.shape[0] * (every if ids is None else 1 + ids.shape[1]) for images, ids in views]


def _fake(images, ids, given, weight, bias, position, cls_token, dtype, compute):  # type: ignore[no-untyped-def]
    rows = sum(_rows(_pair(images, ids, given), position.shape[1]))
    return weight.new_empty((rows, weight.shape[0]), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ids, ctx.given, weight, bias, _, cls_token, _, ctx.compute = inputs
    ctx.save_for_backward(*images, *ids)
    ctx.shapes = [tensor.shape for tensor in (weight, bias, cls_token)]
    ctx.dtypes = [tensor.dtype for tensor in (weight, bias, cls_token)]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved, count = list(ctx.saved_tensors), len(ctx.given)
    lists = [None] * count, [None] * (len(saved) - count), None
    sums = patch_embed_backward(grad, saved[:count], saved[count:], ctx.given, ctx.shapes[0][-1], ctx.compute)
    parts = sums.split_with_sizes([shape.numel() for shape in ctx.shapes])
    *_, weight_wanted, bias_wanted, _, cls_wanted, _, _ = ctx.needs_input_grad
    weight, bias, cls = (
        cast(part.view(shape), dtype) if wanted else None
        for part, shape, dtype, wanted in zip(
            parts, ctx.shapes, ctx.dtypes, (weight_wanted, bias_wanted, cls_wanted), strict=True
        )
    )
    return *lists, weight, bias, None, cls, None, None


@operator(_fake, _setup, _differentiate)
def patch_embed(
    images: Sequence[Tensor],
    ids: Sequence[Tensor],
    given: Sequence[bool],
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls_token: Tensor,
    dtype: torch.dtype,
    compute: torch.dtype,
) -> Tensor:
    """`given` says which views the ids belong to; the others have none."""
    views = _pair(images, ids, given)
    rows = _rows(views, position.shape[1])
    out = weight.new_empty((sum(rows), weight.shape[0]), dtype=dtype)
    for view, part in zip(views, out.split_with_sizes(rows), strict=True):
        kernels.patch_embed.forward(*view, weight, bias, position, cls_token, part, compute)
    return out


def _backward_fake(grad, images, ids, given, patch, compute):  # type: ignore[no-untyped-def]
    return grad.new_empty((grad.shape[1] * (3 * patch * patch + 2),), dtype=torch.float32)


@operator(_backward_fake)
def patch_embed_backward(
    grad: Tensor,
    images: Sequence[Tensor],
    ids: Sequence[Tensor],
    given: Sequence[bool],
    patch: int,
    compute: torch.dtype,
) -> Tensor:
    """fp32 gradients of weight, bias and cls token, one after the other."""
    sums: Tensor = kernels.patch_embed_backward.backward(grad, _pair(images, ids, given), patch, compute)
    return sums
