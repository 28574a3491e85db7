"""Every number a user may change: frozen dataclasses, and the named model presets."""

from lmim_fast.config.model import ModelConfig, PresetName, preset
from lmim_fast.config.run import MAX_PIXELS_LIMIT, DataConfig, Objective, OptimConfig, PretrainConfig
from lmim_fast.config.tools import ConvertConfig, InspectConfig, RenderConfig, ReportConfig
from lmim_fast.config.view import MAX_BLUR_SIGMA, GuidanceConfig

__all__ = [
    "MAX_BLUR_SIGMA",
    "MAX_PIXELS_LIMIT",
    "ConvertConfig",
    "DataConfig",
    "GuidanceConfig",
    "InspectConfig",
    "ModelConfig",
    "Objective",
    "OptimConfig",
    "PresetName",
    "PretrainConfig",
    "RenderConfig",
    "ReportConfig",
    "preset",
]
