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
    from lmim_fast.layers.accelerate import accelerate

__all__ = [
    "Attention",
    "Block",
    "DecoderLayer",
    "DropoutAddLayerNorm",
    "Mlp",
    "ModelConfig",
    "MultiheadAttention",
    "PretrainConfig",
    "accelerate",
    "preset",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """What needs torch, imported when it is first asked for."""
    if name == "accelerate":
        from lmim_fast.layers.accelerate import accelerate

        return accelerate
    if name in __all__:
        from lmim_fast import layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
