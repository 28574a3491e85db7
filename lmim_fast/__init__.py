"""Fast LMIM pre-training for scene text recognition."""

import importlib
from typing import TYPE_CHECKING

from lmim_fast.config import ModelConfig, PretrainConfig, preset

if TYPE_CHECKING:
    from lmim_fast.accelerate import accelerate
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
    "accelerate",
    "preset",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """What needs torch, imported when it is first asked for."""
    if name == "accelerate":
        return importlib.import_module("lmim_fast.accelerate")  # a module that is called as its function
    if name in __all__:
        from lmim_fast import layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
