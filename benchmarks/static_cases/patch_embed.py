"""Cases of kernels/patch_embed.py and kernels/patch_embed_backward.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.shapes import BASE, MASKED, SMALL
from benchmarks.static_build import Case
from benchmarks.static_cases.common import BATCH, DTYPES, empty, named
from lmim_fast.kernels import patch_embed, patch_embed_backward

HEIGHT, WIDTH, PATCH = 32, 128, 4
VISIBLE = SMALL.tokens[-1] - 1 - MASKED


def cases() -> Iterator[Case]:
    for model in (SMALL, BASE):
        for dtype in DTYPES:
            for tokens in (torch.float32, dtype):
                for images in (torch.uint8, torch.float32, dtype):
                    name = f"patch embed {model.name} {named(dtype)}, {named(images)} images, "
                    name += f"{named(tokens)} tokens"
                    yield name, partial(_embed, model.width, PATCH, images, dtype, tokens)
    for width, patch in ((32, 4), (100, 2), (384, 8), (768, 16)):  # other models
        name = f"patch embed of {patch}x{patch} pixels to {width}, bfloat16, uint8 images"
        yield name, partial(_embed, width, patch, torch.uint8, torch.bfloat16, torch.bfloat16)
    for patch in (4, 16):
        name = f"patch embed of {patch}x{patch} pixels to 384, float32, uint8 images"
        yield name, partial(_embed, 384, patch, torch.uint8, torch.float32, torch.float32)


def _embed(width: int, patch: int, of_images: torch.dtype, compute: torch.dtype, tokens: torch.dtype) -> None:
    images = empty(BATCH, 3, HEIGHT, WIDTH, dtype=of_images)
    if of_images == torch.uint8:
        images = empty(BATCH, HEIGHT, WIDTH, 3, dtype=of_images)
    patches = HEIGHT // patch * (WIDTH // patch)
    kept = patches * VISIBLE // 256
    weight, vector = empty(width, 3, patch, patch), empty(width)
    position = empty(1, 1 + patches, width)
    views = [(images, empty(BATCH, kept, dtype=torch.int64)), (images, None)]
    for (view, ids), rows in zip(views, (kept + 1, patches + 1), strict=True):
        out = empty(BATCH * rows, width, dtype=tokens)
        patch_embed.forward(view, ids, weight, vector, position, vector, out, compute)
    grad = empty(BATCH * (patches + kept + 2), width, dtype=tokens)
    patch_embed_backward.backward(grad, views, patch, compute)
