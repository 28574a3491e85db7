"""Fast LMIM pre-training for scene text recognition."""

from typing import TYPE_CHECKING

from lmim_fast.config import ModelConfig, PretrainConfig, preset

if TYPE_CHECKING:
    from lmim_fast.layers import (
        Attention,
        Block,
        DecoderLayer,
        DropoutAddLayerNorm,
        Mlp,
        MultiheadAttention,
    )

__all__ = [
    "Attention",
    "Block",
    "DecoderLayer",
    "DropoutAddLayerNorm",
    "Mlp",
    "ModelConfig",
    "MultiheadAttention",
    "PretrainConfig",
    "preset",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The layers, imported with torch when the first of them is asked for."""
    if name in __all__:
        from lmim_fast import layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
