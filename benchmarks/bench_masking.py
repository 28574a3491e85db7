"""Which patches a sample keeps: from noise, or from seed, epoch and index. Both take a launch's time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.harness import Operation, measure, seconds_a_call
from benchmarks.shapes import MASKED, SMALL, TOKENS
from lmim_fast.ops.masking import draw_patches, mask_noise, select_patches

VARIANTS = ("ours", "eager", "compiled", "torch.rand")
PATCHES = TOKENS[-1] - 1
VISIBLE = PATCHES - MASKED
SEED = 2**40 + 77
pytestmark = pytest.mark.benchmark(timer=seconds_a_call)


def test_masking(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    if direction != "forward":
        pytest.skip("ids have no gradient")
    measure(benchmark, operation, direction, variant)


def operations(batch: int) -> Iterator[Operation]:
    yield _select(batch)
    yield _draw(batch)


def _select(batch: int) -> Operation:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.rand(batch, PATCHES, device=device),)

    def ours(noise: Tensor, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        return _as_floating(select_patches(noise, VISIBLE))

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.select_patches(batch, PATCHES)

    return Operation("select_patches", _sizes(batch), inputs, _sort, {"ours": ours}, passes)


def _draw(batch: int) -> Operation:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        indices = torch.randint(2**24, (batch,), device=device)  # which fp32 holds too
        return indices, torch.full_like(indices, 3)

    def ours(indices: Tensor, epochs: Tensor, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        return _as_floating(draw_patches(SEED, epochs, indices, PATCHES, VISIBLE))

    def plain(indices: Tensor, epochs: Tensor) -> tuple[Tensor, ...]:
        return _sort(mask_noise(SEED, epochs.long(), indices.long(), PATCHES))

    def other_noise(indices: Tensor, epochs: Tensor) -> tuple[Tensor, ...]:
        return _sort(torch.rand(batch, PATCHES, device=indices.device))

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.draw_patches(batch, PATCHES)

    forms, others = {"ours": ours}, {"torch.rand": other_noise}
    return Operation("draw_patches", _sizes(batch), inputs, plain, forms, passes, others=others, leading=True)


def _sort(noise: Tensor) -> tuple[Tensor, ...]:
    order = noise.argsort(dim=1, stable=True)
    return _as_floating((order[:, :VISIBLE].sort(dim=1).values, order[:, VISIBLE:].sort(dim=1).values))


def _as_floating(ids: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same bits: what is measured has floating outputs."""
    return tuple(number.view(torch.float64) for number in ids)


def _sizes(batch: int) -> dict[str, Any]:
    return dict(model=SMALL.name, batch=batch, tokens=TOKENS[-1], p=0.0)
