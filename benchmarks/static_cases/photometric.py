"""Cases of kernels/photometric.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.static_build import Case
from benchmarks.static_cases.common import BATCH, DTYPES, empty, named
from lmim_fast.kernels import photometric

SIZES = ((32, 128), (48, 160))  # the crop of the models; one that is larger than a block and ends within one


def cases() -> Iterator[Case]:
    for height, width in SIZES:
        for dtype in (*DTYPES, torch.float32):
            for guidance in (False, True):
                views = "both views" if guidance else "plain view"
                name = f"photometric ViT-S {views} {height}x{width} {named(dtype)}"
                yield name, partial(_photometric, height, width, dtype, guidance)


def _photometric(height: int, width: int, dtype: torch.dtype, guidance: bool) -> None:
    images = empty(BATCH, height, width, 3, dtype=torch.uint8)
    if not guidance:
        photometric.forward(images, None, [], dtype)
        return
    matrix, number = empty(BATCH, 3, 4), empty(BATCH)
    above, coverage = empty(BATCH, dtype=torch.bool), empty(BATCH, height, width, dtype=torch.uint8)
    program = [matrix, number, above, matrix, coverage, empty(BATCH, 3), number, matrix]
    photometric.forward(images, images, program, dtype)
