"""Sizes of the recogniser: the encoder, and the autoregressive decoder that reads its features."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmim_fast.config.checks import require, require_size
from lmim_fast.config.model import ModelConfig

SPECIAL_CLASSES = 3
"""EOS, PAD and UNK, which follow the characters in this order. The start token is an embedding only."""


@dataclass(frozen=True)
class RecognizerConfig:
    """The recogniser of the released fine-tuning; the defaults are its English ViT-S.

    Source: LMIM (CVPR 2025) and its released code.
    """

    encoder: ModelConfig = field(default_factory=ModelConfig)
    """Encoder sizes; what belongs to pre-training in it is not read."""
    classes: int = 97
    """Characters and EOS, PAD, UNK."""
    max_length: int = 25
    """Longest target in tokens, EOS included."""
    decoder_width: int = 512
    """Decoder width."""
    decoder_depth: int = 6
    """Decoder layers."""
    decoder_heads: int = 8
    """Decoder attention heads."""
    decoder_head_dim: int = 64
    """Width of a decoder head."""
    decoder_ffn: int = 256
    """Decoder feed-forward width."""
    dropout: float = 0.1
    """Decoder dropout: of embeddings and attention weights, after each attention and after the FFN."""
    drop_path: float = 0.0
    """Stochastic depth of the encoder: probability of the last block, rising linearly from 0."""
    label_smoothing: float = 0.0
    """Share of a target that is spread evenly over all classes but PAD."""

    def __post_init__(self) -> None:
        sizes = "decoder_width", "decoder_depth", "decoder_heads", "decoder_head_dim", "decoder_ffn"
        for name in ("max_length", *sizes):
            require_size(name, getattr(self, name))
        require(
            self.decoder_width % 2 == 0,
            f"decoder_width must be even (sin and cos positions), got {self.decoder_width}",
        )
        require(
            self.classes > SPECIAL_CLASSES,
            f"classes must be more than the {SPECIAL_CLASSES} special ones, got {self.classes}",
        )
        for name in ("dropout", "drop_path", "label_smoothing"):
            require(0.0 <= getattr(self, name) < 1.0, f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def characters(self) -> int:
        """Classes that are characters; as class numbers 0 .. characters - 1."""
        return self.classes - SPECIAL_CLASSES

    @property
    def eos(self) -> int:
        """Class that ends a word."""
        return self.characters

    @property
    def pad(self) -> int:
        """Class that fills targets behind EOS."""
        return self.characters + 1

    @property
    def unknown(self) -> int:
        """Class of characters outside the set."""
        return self.characters + 2

    @property
    def start(self) -> int:
        """Row of the embedding that begins every word; no class."""
        return self.classes
