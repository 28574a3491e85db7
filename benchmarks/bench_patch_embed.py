"""Patch embedding of the kept patches, of all of them, and of both views into one matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import floors
from benchmarks.harness import DTYPE, Operation, measure, seconds_a_call
from benchmarks.shapes import BASE, SMALL, TOKENS
from lmim_fast.ops.masking import select_patches
from lmim_fast.ops.patch_embed import patch_embed_packed

VARIANTS = ("ours", "eager", "compiled")
HEIGHT, WIDTH, PATCH = 32, 128, 4
SHOWN, ALL = TOKENS
VALUES = 3 * PATCH * PATCH
pytestmark = pytest.mark.benchmark(timer=seconds_a_call)


def test_patch_embed(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    measure(benchmark, operation, direction, variant)


def operations(batch: int) -> Iterator[Operation]:
    for model in (SMALL, BASE):
        for views in ((SHOWN,), (ALL,), (SHOWN, ALL)):
            yield _operation(model.name, batch, model.width, views, torch.uint8)
    yield _operation(SMALL.name, batch, SMALL.width, (ALL,), DTYPE)


def _operation(
    model: str, batch: int, width: int, views: tuple[int, ...], of_images: torch.dtype
) -> Operation:
    """Tokens are in the products' dtype; parameters are fp32, as under autocast."""

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        ids, _ = select_patches(torch.rand(batch, ALL - 1, device=device), SHOWN - 1)
        weight = torch.randn(width, 3, PATCH, PATCH, device=device) / PATCH
        bias, cls = torch.randn(width, device=device), torch.randn(1, 1, width, device=device)
        learned = (tensor.requires_grad_() for tensor in (weight, bias, cls))
        return *learned, torch.randn(1, ALL, width, device=device), ids, *(images(device) for _ in views)

    def images(device: torch.device) -> Tensor:
        if of_images == torch.uint8:
            return torch.randint(0, 256, (batch, HEIGHT, WIDTH, 3), dtype=torch.uint8, device=device)
        return (torch.rand(batch, 3, HEIGHT, WIDTH, device=device) * 2 - 1).to(of_images)

    def ours(
        weight: Tensor,
        bias: Tensor,
        cls: Tensor,
        position: Tensor,
        ids: Tensor,
        *images: Tensor,
        seed: Tensor | None = None,
    ) -> Tensor:
        given = [(view, ids if tokens == SHOWN else None) for view, tokens in zip(images, views, strict=True)]
        with torch.autocast(weight.device.type, dtype=DTYPE, enabled=DTYPE.itemsize < 4):
            return patch_embed_packed(given, weight, bias, position, cls, dtype=DTYPE)

    def plain(
        weight: Tensor, bias: Tensor, cls: Tensor, position: Tensor, ids: Tensor, *images: Tensor
    ) -> Tensor:
        rows = []
        for view, tokens in zip(images, views, strict=True):
            kept = ids.long() if tokens == SHOWN else None
            kind = DTYPE if view.dtype == torch.uint8 else view.dtype
            rows.append(_plain_view(view, weight, bias, cls, position, kept, kind))
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def passes(itemsize: int, training: bool) -> floors.Passes:
        parts = [
            floors.patch_embed(batch, tokens - 1, width, VALUES, of_images.itemsize, itemsize)
            for tokens in views
        ]
        forward = tuple(work for part in parts for work in part.forward)
        return floors.Passes(forward, tuple(work for part in parts for work in part.backward))

    sizes = dict(model=model, batch=batch, tokens=sum(views), width=width, p=0.0)
    if of_images != torch.uint8:
        sizes["images"] = str(of_images).removeprefix("torch.")
    leading = (model, views, of_images) == (SMALL.name, (SHOWN, ALL), torch.uint8)
    return Operation("patch_embed", sizes, inputs, plain, {"ours": ours}, passes, leading=leading)


def _plain_view(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    cls: Tensor,
    position: Tensor,
    ids: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Tokens (B * (1 + K), D) in `dtype`, which is that of the product too."""
    if images.shape[-1] == 3:  # bytes, or their exact form
        images = images.permute(0, 3, 1, 2).to(weight.dtype) / 127.5 - 1
    grid = images.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    place = position[:, 1:]
    if ids is not None:
        patches = patches.gather(1, ids[:, :, None].expand(-1, -1, VALUES))
        place = place[0][ids]
    weight = weight.flatten(1)
    tokens = F.linear(patches.to(dtype), weight.to(dtype), bias.to(dtype)) + place.to(dtype)
    first = (cls + position[:, :1]).to(dtype).expand(len(images), -1, -1)
    return torch.cat([first, tokens], dim=1).flatten(0, 1)
