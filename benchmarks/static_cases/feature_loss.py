"""Cases of kernels/feature_loss.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.shapes import BASE, MASKED, SMALL, TOKENS
from benchmarks.static_build import Case
from benchmarks.static_cases.common import BATCH, DTYPES, empty, named
from lmim_fast.kernels import feature_loss

PATCH = 4  # pixels


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for model in (SMALL, BASE):
            name = f"feature loss {model.name} {BATCH}x{MASKED}x{model.width} {named(dtype)}"
            yield name, partial(_features, model.width, dtype)
        yield f"pixel loss ViT {BATCH}x{MASKED}x{3 * PATCH**2} {named(dtype)}", partial(_pixels, dtype)


def _features(width: int, dtype: torch.dtype) -> None:
    product, features = empty(BATCH, MASKED, width, dtype=dtype), empty(BATCH, TOKENS[-1], width, dtype=dtype)
    for wanted in (False, True):
        _, gradient, _ = feature_loss.features_forward(
            product, empty(width), features, _ids(), 1e-5, gradient=wanted, bias_gradient=wanted
        )
    assert gradient is not None
    feature_loss.scale(gradient, empty())


def _pixels(dtype: torch.dtype) -> None:
    product = empty(BATCH, MASKED, 3 * PATCH**2, dtype=dtype)
    height, width = 32, 128
    for images in (
        empty(BATCH, height, width, 3, dtype=torch.uint8),
        empty(BATCH, 3, height, width, dtype=dtype),
    ):
        for normalise in (False, True):
            feature_loss.pixels_forward(
                product,
                empty(3 * PATCH**2),
                images,
                _ids(),
                PATCH,
                normalise=normalise,
                gradient=True,
                bias_gradient=True,
            )


def _ids() -> torch.Tensor:
    return empty(BATCH, MASKED, dtype=torch.int64)
