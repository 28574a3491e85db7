"""Colours of both views, from bytes to normalised inputs; of the plain view alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.harness import DTYPE, Operation, measure, seconds_a_call
from benchmarks.shapes import SMALL
from lmim_fast.ops.photometric import LUMA, ColorProgram, photometric

VARIANTS = ("ours", "eager", "compiled")
HEIGHT, WIDTH = 32, 128
pytestmark = pytest.mark.benchmark(timer=seconds_a_call)


def test_photometric(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    if direction != "forward":
        pytest.skip("views have no gradient")
    measure(benchmark, operation, direction, variant)


def operations(batch: int) -> Iterator[Operation]:
    yield _views(batch, guidance=True)
    yield _views(batch, guidance=False)


def _views(batch: int, guidance: bool) -> Operation:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        def images(*shape: int) -> Tensor:
            return torch.randint(0, 256, (batch, HEIGHT, WIDTH, *shape), dtype=torch.uint8, device=device)

        plain = images(3)
        if not guidance:
            return (plain,)
        return plain, images(3), *_program(batch, images(), device).tensors()

    def ours(plain: Tensor, *others: Tensor, seed: Tensor | None = None) -> tuple[Tensor, ...]:
        if not others:
            return (photometric(plain, dtype=DTYPE)[0],)
        view, second = photometric(plain, others[0], ColorProgram(*others[1:]), dtype=DTYPE)
        assert second is not None
        return view, second

    def plain_torch(plain: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        kind = DTYPE if plain.dtype == torch.uint8 else plain.dtype
        views = (_planes(plain), _color(_planes(others[0]), *others[1:])) if others else (_planes(plain),)
        return tuple((view / 127.5 - 1).to(kind) for view in views)

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.photometric(batch, HEIGHT * WIDTH, itemsize, guidance)

    sizes = dict(model=SMALL.name, batch=batch, tokens=257, p=0.0, views="both" if guidance else "plain")
    return Operation("photometric", sizes, inputs, plain_torch, {"ours": ours}, passes, leading=guidance)


def _program(batch: int, coverage: Tensor, device: torch.device) -> ColorProgram:
    """Random; values at the threshold are halves, thresholds are not: rounding moves none over."""

    def matrices() -> Tensor:
        matrix = torch.eye(3, device=device) + 0.3 * torch.rand(batch, 3, 3, device=device)
        return torch.cat((matrix, 20 * torch.rand(batch, 3, 1, device=device)), dim=2)

    halves = torch.eye(3, 4, device=device) / 2
    halves[:, 3] = 30
    return ColorProgram(
        before=halves.repeat(batch, 1, 1),
        threshold=torch.randint(32, 128, (batch,), device=device) + 0.25,
        invert_above=torch.rand(batch, device=device) < 0.5,
        after=matrices(),
        coverage=coverage,
        border=255 * torch.rand(batch, 3, device=device),
        contrast=0.6 + 0.8 * torch.rand(batch, device=device),
        final=matrices(),
    )


def _planes(images: Tensor) -> Tensor:
    """fp32, or fp64 as it comes."""
    planes = images.permute(0, 3, 1, 2).contiguous()
    return planes.float() if planes.dtype == torch.uint8 else planes


def _color(
    value: Tensor,
    before: Tensor,
    threshold: Tensor,
    above: Tensor,
    after: Tensor,
    coverage: Tensor,
    border: Tensor,
    contrast: Tensor,
    final: Tensor,
) -> Tensor:
    value = _affine(before, value)
    inverted = (value >= threshold[:, None, None, None]) == (above != 0)[:, None, None, None]
    value = _affine(after, torch.where(inverted, 255 - value, value))
    value = torch.lerp(border[:, :, None, None], value, (coverage / 255)[:, None])
    gray = sum(value[:, number] * weight for number, weight in enumerate(LUMA))
    assert isinstance(gray, Tensor)
    mean = gray.mean((1, 2))[:, None, None, None]
    return _affine(final, torch.lerp(mean, value, contrast[:, None, None, None]).clamp(0, 255))


def _affine(matrix: Tensor, value: Tensor) -> Tensor:
    """(B, 3, 4) applied to the colours of (B, 3, H, W), clamped."""
    rows = matrix[:, :, :, None, None]
    result = rows[:, :, 0] * value[:, 0:1] + rows[:, :, 1] * value[:, 1:2] + rows[:, :, 2] * value[:, 2:3]
    return (result + rows[:, :, 3]).clamp(0, 255)
