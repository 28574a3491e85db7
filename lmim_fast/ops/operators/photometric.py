"""Colours of both views by their kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmim_fast import kernels
from lmim_fast.ops.operators.operator import operator


def _fake(plain, warped, program, dtype):  # type: ignore[no-untyped-def]
    batch, height, width, _ = plain.shape
    view = plain.new_empty((batch, 3, height, width), dtype=dtype)
    return view, view.new_empty(0) if warped is None else torch.empty_like(view)


@operator(_fake)
def photometric(
    plain: Tensor, warped: Tensor | None, program: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Plain views, guidance views (empty where warped is None); program: the fields in their order."""
    view, guidance = kernels.photometric.forward(
        _aligned(plain), None if warped is None else _aligned(warped), program, dtype
    )
    return view, view.new_empty(0) if guidance is None else guidance


def _aligned(images: Tensor) -> Tensor:
    """Contiguous, at whole words: torch puts what it allocates there, a slice may be anywhere."""
    images = images.contiguous()
    return images.clone() if images.data_ptr() % 4 or images.storage_offset() % 4 else images
