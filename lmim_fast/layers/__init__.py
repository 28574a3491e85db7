"""Drop-in modules on the fast ops, with the parameter names of timm, torch and the released decoder."""

from lmim_fast.layers.attention import Attention, MultiheadAttention
from lmim_fast.layers.block import Block
from lmim_fast.layers.decoder_layer import DecoderLayer
from lmim_fast.layers.mlp import Mlp
from lmim_fast.layers.norm import DropoutAddLayerNorm

__all__ = ["Attention", "Block", "DecoderLayer", "DropoutAddLayerNorm", "Mlp", "MultiheadAttention"]
