"""Every number a user may change: frozen dataclasses, the named presets and recipes."""

from lmim_fast.config.augment import AugmentConfig
from lmim_fast.config.evaluate import EvaluateConfig
from lmim_fast.config.finetune import FinetuneConfig, LabelConfig, recipe, recognizer_preset
from lmim_fast.config.model import ModelConfig, PresetName, preset
from lmim_fast.config.pretrain import PretrainConfig
from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.config.render import RenderConfig
from lmim_fast.config.run import MAX_PIXELS_LIMIT, DataConfig, Objective, OptimConfig, RunConfig
from lmim_fast.config.tools import CharsetConfig, ConvertConfig, InspectConfig, ReportConfig
from lmim_fast.config.view import MAX_BLUR_SIGMA, GuidanceConfig

__all__ = [
    "MAX_BLUR_SIGMA",
    "MAX_PIXELS_LIMIT",
    "AugmentConfig",
    "CharsetConfig",
    "ConvertConfig",
    "DataConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GuidanceConfig",
    "InspectConfig",
    "LabelConfig",
    "ModelConfig",
    "Objective",
    "OptimConfig",
    "PresetName",
    "PretrainConfig",
    "RecognizerConfig",
    "RenderConfig",
    "ReportConfig",
    "RunConfig",
    "preset",
    "recipe",
    "recognizer_preset",
]
