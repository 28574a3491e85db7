"""A pre-training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmim_fast.config.checks import PathName
from lmim_fast.config.model import ModelConfig
from lmim_fast.config.run import RunConfig
from lmim_fast.config.view import GuidanceConfig


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """One pre-training run."""

    output: PathName = "runs/pretrain"
    """Run folder: config.json, metrics.jsonl, checkpoints/, tensorboard/."""
    objective: Literal["lmim", "mae"] = "lmim"
    """mae: the stage that makes a teacher; lmim: guided masked feature modelling."""
    init: PathName | None = None
    """Weights that the student starts from (same kinds as teacher)."""
    teacher: PathName | None = None
    """Weights of the LMIM teacher: a file (released, MAERec, timm or ours; FILE::KEY chooses one of several
    models in it), a run or checkpoint folder, or "random" for an ablation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model sizes and ablations."""
    view: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Guidance view strength."""

    @property
    def encoder(self) -> ModelConfig:
        """Sizes of the encoder."""
        return self.model
