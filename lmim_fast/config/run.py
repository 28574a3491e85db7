"""A training run: input pipeline, optimiser, and what pre-training and fine-tuning share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from lmim_fast.config.checks import require, require_seed
from lmim_fast.config.model import ModelConfig, PresetName

Objective = Literal["lmim", "mae", "recognizer"]

MAX_PIXELS_LIMIT = 2**40
"""Largest `DataConfig.max_pixels`: keeps every size in the header reader's arithmetic far below 2^64."""


@dataclass(frozen=True)
class DataConfig:
    """How records become batches."""

    threads: int = 0
    """Data threads per process; 0 takes the CPU cores of this process over the local processes."""
    prefetch: int = 2
    """Batches prepared ahead."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where views are made; auto: where training runs. gpu: the same, but refused unless that is CUDA."""
    max_bad_fraction: float = 0.10
    """The run stops when more than this share of the records seen so far could not be decoded."""
    max_pixels: int = 2**26
    """A record that claims more pixels than this is counted as broken."""

    def __post_init__(self) -> None:
        require(self.threads >= 0, f"threads must be >= 0, got {self.threads}")
        require(self.prefetch >= 1, f"prefetch must be >= 1, got {self.prefetch}")
        require(
            0.0 <= self.max_bad_fraction <= 1.0,
            f"max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}",
        )
        require(
            1 <= self.max_pixels <= MAX_PIXELS_LIMIT,
            f"max_pixels must be in [1, 2^40], got {self.max_pixels}",
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule, per step. Source: LMIM's recipe."""

    lr: float | None = None
    """Peak learning rate, taken as it is; None: base_lr x batch_size / 256."""
    base_lr: float = 1.5e-4
    """Peak learning rate per 256 images, used when lr is None."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moment decays."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.05
    """Decoupled decay of tensors with two or more dimensions (in pre-training cls and mask token too)."""
    warmup_epochs: float = 1.0
    """Linear warm-up length in epochs, used when warmup_steps is None."""
    warmup_steps: int | None = None
    """Linear warm-up length in steps."""
    clip_norm: float | None = None
    """Largest global gradient norm; None: no clipping, as released."""
    schedule: Literal["cosine", "one_cycle"] = "cosine"
    """cosine: linear warm-up from 0, half-cosine down; one_cycle: half-cosines up from lr / 25 and down."""
    final_lr: float = 0.0
    """Learning rate at the end."""
    layer_decay: float = 1.0
    """Factor from each encoder block's learning rate to that of the block below it."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, which is what is kept; 0: none."""

    def __post_init__(self) -> None:
        require(self.lr is None or self.lr > 0, f"lr must be positive, got {self.lr}")
        require(self.base_lr > 0, f"base_lr must be positive, got {self.base_lr}")
        require(self.weight_decay >= 0, f"weight_decay must be >= 0, got {self.weight_decay}")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas must be in [0, 1), got {self.betas}")
        require(self.eps > 0, f"eps must be positive, got {self.eps}")
        require(self.warmup_epochs >= 0, f"warmup_epochs must be >= 0, got {self.warmup_epochs}")
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"warmup_steps must be >= 0, got {self.warmup_steps}",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0, f"clip_norm must be positive, got {self.clip_norm}"
        )
        require(self.final_lr >= 0, f"final_lr must be >= 0, got {self.final_lr}")
        require(0 < self.layer_decay <= 1, f"layer_decay must be in (0, 1], got {self.layer_decay}")
        require(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True)
class RunConfig(ABC):
    """One training run; its subclasses say what is trained."""

    data: tuple[str, ...]
    """LMDB folders, or folders that hold LMDB folders at any depth."""
    output: str = "runs/run"
    """Run folder: config.json, metrics.jsonl, checkpoints/, tensorboard/."""
    objective: Objective = "lmim"
    """What is trained."""
    preset: PresetName = "small"
    """Model size; single values of it can be overridden by the model options."""
    init: str | None = None
    """File or run folder whose weights the model starts from."""
    batch_size: int = 512
    """Images per optimiser step, over all processes and accumulation steps."""
    accumulation: int = 1
    """Forward-backward passes per optimiser step."""
    epochs: float = 10.0
    """Length of the run in epochs, used when steps is None."""
    steps: int | None = None
    """Length of the run in optimiser steps."""
    seed: int = 0
    """Governs the weights' start, sample order, masks, views and dropout."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the products: auto is bf16 on CUDA, fp32 on a CPU; weights, statistics and losses stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    compile: bool = False
    """Put torch.compile around the model."""
    cuda_graph: bool = False
    """Replay the whole step as one CUDA graph; for one process on CUDA, without accumulation."""
    resume: bool = True
    """Continue from the newest good checkpoint in the run folder; False refuses a folder that has one."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept on disk."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    loader: DataConfig = field(default_factory=DataConfig)
    """Input pipeline."""

    @property
    @abstractmethod
    def encoder(self) -> ModelConfig:
        """Sizes of the encoder."""

    def __post_init__(self) -> None:
        require(len(self.data) > 0, "data must name at least one LMDB folder")
        for name in ("batch_size", "accumulation", "checkpoint_every", "keep_checkpoints", "log_every"):
            require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        require(self.steps is None or self.steps >= 1, f"steps must be >= 1, got {self.steps}")
        require(self.epochs > 0, f"epochs must be positive, got {self.epochs}")
        require_seed(self.seed)
        require(
            not self.cuda_graph or self.accumulation == 1,
            f"cuda_graph needs accumulation 1, got {self.accumulation}",
        )
        require(
            self.batch_size % self.accumulation == 0,
            f"batch_size {self.batch_size} must be a multiple of accumulation {self.accumulation}",
        )
