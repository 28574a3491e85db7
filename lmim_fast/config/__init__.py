"""Every number a user may change: frozen dataclasses, the named presets and recipes."""

from lmim_fast.config.augment import AugmentConfig
from lmim_fast.config.collections import ImportConfig, MergeConfig, SplitConfig
from lmim_fast.config.doctor import DoctorConfig, DoctorFinetuneConfig, DoctorPretrainConfig
from lmim_fast.config.evaluate import EvaluateConfig
from lmim_fast.config.finetune import FinetuneConfig, LabelConfig, recipe, recognizer_preset
from lmim_fast.config.model import ModelConfig, PresetName, preset
from lmim_fast.config.pretrain import PretrainConfig
from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.config.render import RenderConfig
from lmim_fast.config.run import MAX_PIXELS, MAX_PIXELS_LIMIT, DataConfig, Objective, OptimConfig, RunConfig
from lmim_fast.config.tools import (
    CharsetConfig,
    ConvertConfig,
    InspectConfig,
    ReportConfig,
    SheetConfig,
    StatsConfig,
    VerifyConfig,
)
from lmim_fast.config.view import MAX_BLUR_SIGMA, GuidanceConfig

__all__ = [
    "MAX_BLUR_SIGMA",
    "MAX_PIXELS",
    "MAX_PIXELS_LIMIT",
    "AugmentConfig",
    "CharsetConfig",
    "ConvertConfig",
    "DataConfig",
    "DoctorConfig",
    "DoctorFinetuneConfig",
    "DoctorPretrainConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GuidanceConfig",
    "ImportConfig",
    "InspectConfig",
    "LabelConfig",
    "MergeConfig",
    "ModelConfig",
    "Objective",
    "OptimConfig",
    "PresetName",
    "PretrainConfig",
    "RecognizerConfig",
    "RenderConfig",
    "ReportConfig",
    "RunConfig",
    "SheetConfig",
    "SplitConfig",
    "StatsConfig",
    "VerifyConfig",
    "preset",
    "recipe",
    "recognizer_preset",
]
