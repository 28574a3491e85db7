"""Cases of kernels/masking.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.shapes import MASKED, SMALL
from benchmarks.static_build import Case
from benchmarks.static_cases.common import BATCH, empty
from lmim_fast.kernels import masking
from lmim_fast.ops.philox import Stream

PATCHES = SMALL.tokens[-1] - 1
VISIBLE = PATCHES - MASKED


def cases() -> Iterator[Case]:
    for patches, visible in ((PATCHES, VISIBLE), (PATCHES, 64), (1024, 205)):
        yield f"patch selection, {visible} of {patches}", partial(_select, patches, visible)
        yield f"drawn patches, {visible} of {patches}", partial(_draw, patches, visible)


def _select(patches: int, visible: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        masking.select(empty(BATCH, patches, dtype=dtype), visible)


def _draw(patches: int, visible: int) -> None:
    indices = empty(BATCH, dtype=torch.int64)
    for epochs in (indices, None):
        masking.draw(7, epochs, 0, indices, patches, visible, Stream.MASK)
