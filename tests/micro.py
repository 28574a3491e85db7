"""The smallest model that has all that LMIM and MAE have: for the interpreter, and for one run a part."""

from lmim_fast.config import ModelConfig

MICRO = ModelConfig(
    image_size=(8, 16),
    width=64,
    depth=2,
    heads=2,
    mlp_ratio=2.0,
    decoder_width=32,
    decoder_depth=2,
    decoder_heads=2,
    decoder_ffn=48,
    decoder_dropout=0.0,
    mae_decoder_depth=1,
    mask_ratio=0.6,
    pos_grid="true",
)
