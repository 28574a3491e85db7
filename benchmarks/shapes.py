"""The sizes that are swept: the encoders ViT-S and ViT-B, and the decoder."""

from __future__ import annotations

from typing import NamedTuple

TOKENS = (52, 257)  # cls and 51 visible patches; cls and all 256
MASKED = 205


class Model(NamedTuple):
    """A stack of layers."""

    name: str
    width: int
    heads: int
    hidden: int
    tokens: tuple[int, ...]
    dropouts: tuple[float, ...]


SMALL = Model("ViT-S", 384, 6, 1536, TOKENS, (0.0,))
BASE = Model("ViT-B", 768, 12, 3072, TOKENS, (0.0,))
DECODER = Model("decoder", 512, 16, 2048, (257,), (0.0, 0.1))
MODELS = (SMALL, DECODER, BASE)
