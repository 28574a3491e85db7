"""How kernels are judged: against the truth, by the error that the eager form has in the same precision."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lmim_fast.kernels import runtime

OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0  # a kernel rounds at other places than the eager form

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# Kernels run here: on a device, or in the interpreter, where bf16 products are wrong.
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]


def every_second(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of the axes, of which in the interpreter every second one is slow.

    So each value of an axis meets half of the others'. A tuple in an axis stands for several parameters.
    """
    combinations = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        chosen = [axis[place] for axis, place in zip(axes, places, strict=True)]
        values = [one for value in chosen for one in (value if isinstance(value, tuple) else (value,))]
        marks = [pytest.mark.slow] if sum(places) % 2 and not CUDA else []
        combinations.append(pytest.param(*values, marks=marks))
    return combinations


def assert_as_accurate(
    ours: Sequence[Tensor | None], low: Sequence[Tensor | None], truth: Sequence[Tensor | None], factor: float
) -> None:
    """Largest error of each tensor of ours <= factor x that of `low`, the eager form in the same precision.

    The error allowed is never below one rounding (half a unit in the last place) of the largest true value.
    """
    assert len(ours) == len(low) == len(truth)
    for number, (mine, eager, exact) in enumerate(zip(ours, low, truth, strict=True)):
        if exact is None:
            assert mine is None, f"tensor {number}: expected none"
            continue
        assert mine is not None, f"tensor {number}: nothing came"
        assert eager is not None
        assert (mine.shape, mine.dtype) == (eager.shape, eager.dtype), f"tensor {number}"
        assert mine.isfinite().all(), f"tensor {number} is not finite"
        if exact.numel() == 0:
            continue
        exact = exact.double()
        rounding = torch.finfo(mine.dtype).eps / 2 * exact.abs().max()
        allowed = factor * torch.maximum((eager.double() - exact).abs().max(), rounding)
        error = (mine.double() - exact).abs().max()
        assert error <= allowed, f"tensor {number}: error {error:.3g}, allowed {allowed:.3g}"


def assert_rms_as_accurate(
    ours: Sequence[Tensor], low: Sequence[Tensor], truth: Sequence[Tensor], factor: float = GRADIENT_FACTOR
) -> None:
    """As `assert_as_accurate` by root mean square: for sums over M rows, whose errors grow as sqrt(M)."""
    for number, (mine, eager, exact) in enumerate(zip(ours, low, truth, strict=True)):
        exact = exact.double()
        rounding = torch.finfo(mine.dtype).eps / 2 * exact.square().mean().sqrt()
        allowed = factor * torch.maximum((eager.double() - exact).square().mean().sqrt(), rounding)
        error = (mine.double() - exact).square().mean().sqrt()
        assert error <= allowed, f"tensor {number}: RMS error {error:.3g}, allowed {allowed:.3g}"


def interpreted() -> bool:
    """True where these tests run kernels in the interpreter."""
    return not CUDA and runtime.can_run(DEVICE)
