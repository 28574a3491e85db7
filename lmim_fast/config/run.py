"""A training run: input pipeline, optimiser, and what pre-training and fine-tuning share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from lmim_fast.config.checks import PathName, require, require_seed
from lmim_fast.config.model import ModelConfig, PresetName

Objective = Literal["lmim", "mae", "recognizer"]

MAX_PIXELS = 2**22
"""Twice the largest of 40,000 real word crops; a valid file of 1 MB can claim hundreds of times as many."""
MAX_THREADS = 4096
"""Largest number of threads of a process; more is a slip of the pen."""
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
    max_pixels: int = MAX_PIXELS
    """A record that claims more pixels (height x width) than this is broken, "too large". The default is a
    line of 64 x 65,536, or 12 MB decoded."""
    skip: PathName | None = None
    """Skip list of `lmim data verify`: its records are never read, others take their place."""

    def __post_init__(self) -> None:
        require(
            0 <= self.threads <= MAX_THREADS, f"threads must be in [0, {MAX_THREADS}], got {self.threads}"
        )
        require(1 <= self.prefetch <= 1000, f"prefetch must be in [1, 1000], got {self.prefetch}")
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
        require(
            0 <= self.warmup_epochs <= 1e9, f"warmup_epochs must be in [0, 1e9], got {self.warmup_epochs}"
        )
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

    data: tuple[PathName, ...]
    """LMDB folders, or folders that hold LMDB folders at any depth."""
    output: PathName = "runs/run"
    """Run folder: config.json, metrics.jsonl, checkpoints/, tensorboard/."""
    objective: Objective = "lmim"
    """What is trained."""
    preset: PresetName = "small"
    """Model size; single values of it can be overridden by the model options."""
    init: PathName | None = None
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
    """Type of the products: auto is bf16 on CUDA, fp32 on a CPU. Master weights, losses, sums stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    parallel: Literal["auto", "replicate", "shard", "hybrid"] = "auto"
    """Model on several processes. replicate: whole; shard: split (FSDP2); hybrid: split within groups."""
    shard_size: int = 0
    """Processes that hybrid splits the model over; 0: those of a machine."""
    reshard: bool = False
    """Free the gathered weights of a block after its forward pass: less memory, more communication."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more work."""
    compile: bool = False
    """Use torch.compile: for the whole model, or for each block if the model is split."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the whole step as one CUDA graph; auto: on CUDA wherever it is possible."""
    resume: bool = True
    """Continue from the newest good checkpoint in the run folder; False refuses a folder that has one."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept on disk; with --eval-every also the one of the lowest loss."""
    keep_every: int = 0
    """Keep also each checkpoint whose step is a multiple of this; 0: none."""
    checkpoint_layout: Literal["auto", "whole", "sharded"] = "auto"
    """whole: safetensors files by rank 0; sharded: a file of each process; auto: whole if it fits a host."""
    max_time: float | None = None
    """Hours after which the run stops with a checkpoint; the same command continues it."""
    timeout: float = 600.0
    """Seconds that processes wait for each other before the run ends with the stacks of all of them."""
    eval_data: tuple[PathName, ...] = ()
    """LMDB folders of held-out crops whose loss is measured while training."""
    eval_every: int = 0
    """Steps between measurements of the loss of eval_data; it ranks the checkpoint of its step. 0: none."""
    eval_images: int = 2048
    """Crops of eval_data that are measured; always the same ones, with the same masks and views."""
    profile: int = 0
    """Steps to write a chrome trace of, after the first ten; 0: none."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well."""
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
        require(0 < self.epochs <= 1e9, f"epochs must be in (0, 1e9], got {self.epochs}")
        require(self.batch_size <= 2**24, f"batch_size must be at most 2^24, got {self.batch_size}")
        require_seed(self.seed)
        for name in ("shard_size", "keep_every", "eval_every", "profile"):
            require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name)}")
        require(self.eval_images >= 1, f"eval_images must be >= 1, got {self.eval_images}")
        require(
            (self.eval_every > 0) == (len(self.eval_data) > 0),
            "eval_every and eval_data are given together or not at all",
        )
        require(self.max_time is None or self.max_time > 0, f"max_time must be positive, got {self.max_time}")
        require(0 < self.timeout <= 1e8, f"timeout must be in (0, 1e8] seconds, got {self.timeout}")
        require(
            self.cuda_graph != "on" or self.accumulation == 1,
            f"cuda_graph on needs accumulation 1, got {self.accumulation}",
        )
        require(
            self.batch_size % self.accumulation == 0,
            f"batch_size {self.batch_size} must be a multiple of accumulation {self.accumulation}",
        )
