"""Fast LMIM pre-training for scene text recognition."""

from lmim_fast.config import ModelConfig, PretrainConfig, preset

__all__ = ["ModelConfig", "PretrainConfig", "preset"]
__version__ = "0.1.0"
