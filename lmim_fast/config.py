"""Every number a user may change: frozen dataclasses and the named model presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

Objective = Literal["lmim", "mae"]
PresetName = Literal["tiny", "small", "base"]

MAX_PIXELS_LIMIT = 2**40
"""Largest `DataConfig.max_pixels`: keeps every size in the header reader's arithmetic far below 2^64."""
MAX_BLUR_SIGMA = 5.0
"""Largest `GuidanceConfig.blur_sigma`: its kernel is 27 pixels wide, about the height of a word crop."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_seed(seed: int) -> None:
    _require(0 <= seed < 2**64, f"seed must be in [0, 2^64), got {seed}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and ablation switches of the LMIM and MAE pre-training models.

    The defaults are the released ViT-S; `preset` gives the other sizes.
    Source: LMIM (CVPR 2025) and its released code.
    """

    image_size: tuple[int, int] = (32, 128)
    """Height and width of a crop in pixels."""
    patch_size: int = 4
    """Side of a square patch in pixels."""
    width: int = 384
    """Encoder width D."""
    depth: int = 12
    """Encoder blocks."""
    heads: int = 6
    """Encoder attention heads."""
    mlp_ratio: float = 4.0
    """Encoder MLP width over D."""
    decoder_width: int = 512
    """Decoder width."""
    decoder_depth: int = 2
    """LMIM decoder layers."""
    decoder_heads: int = 16
    """Decoder attention heads."""
    decoder_ffn: int = 2048
    """LMIM decoder feed-forward width."""
    decoder_dropout: float = 0.1
    """LMIM decoder dropout: attention weights, after each attention, inside and after the FFN."""
    decoder_order: Literal["sa_ca", "ca_sa"] = "sa_ca"
    """Which attention of an LMIM decoder layer comes first."""
    mask_ratio: float = 0.8
    """LMIM: share of the patches that is masked."""
    pos_grid: Literal["released", "true"] = "released"
    """Grid of the sin-cos tables: the release's 16 x 16, which folds a text line in two, or the true grid."""
    align_weight: float = 1.0
    """Weight of the cls alignment loss."""
    align_stop_gradient: Literal["none", "masked", "guidance"] = "none"
    """The branch that gets no gradient from the alignment loss."""
    target: Literal["teacher", "pixel", "norm_pixel"] = "teacher"
    """What LMIM reconstructs: teacher features, pixels, or per-patch normalised pixels."""
    guidance: bool = True
    """False: the decoder cross-attends to the masked branch's own latent and there is no alignment loss."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Type of the encoder's residual stream when products run in bf16."""
    gelu_epilogue: Literal["auto", "on", "off"] = "auto"
    """GELU in the epilogue of MLP products on CUDA; auto: LMIM_FAST_GELU_EPILOGUE, else what was faster."""
    mae_mask_ratio: float = 0.75
    """MAE stage: share of the patches that is masked."""
    mae_decoder_depth: int = 8
    """MAE stage: decoder blocks (pre-norm ViT blocks of decoder_width and decoder_heads)."""

    def __post_init__(self) -> None:
        height, width = self.image_size
        for name in (
            "patch_size",
            "width",
            "depth",
            "heads",
            "decoder_width",
            "decoder_depth",
            "decoder_heads",
        ):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(self.decoder_ffn > 0, f"decoder_ffn must be positive, got {self.decoder_ffn}")
        _require(
            self.mae_decoder_depth > 0, f"mae_decoder_depth must be positive, got {self.mae_decoder_depth}"
        )
        narrowest = min(self.width, self.decoder_width)  # the MAE stage's decoder uses the ratio too
        _require(
            1 <= narrowest * self.mlp_ratio < math.inf,
            f"mlp_ratio must give at least one hidden unit at width {narrowest}, got {self.mlp_ratio}",
        )
        _require(
            height > 0 and width > 0 and height % self.patch_size == 0 and width % self.patch_size == 0,
            f"image_size {self.image_size} must be positive multiples of patch_size {self.patch_size}",
        )
        for name, heads in (("width", self.heads), ("decoder_width", self.decoder_heads)):
            value = getattr(self, name)
            _require(value % heads == 0, f"{name} {value} must be a multiple of its {heads} heads")
            _require(value % 4 == 0, f"{name} {value} must be a multiple of 4 (2-D sin-cos positions)")
        _require(
            0.0 <= self.decoder_dropout < 1.0,
            f"decoder_dropout must be in [0, 1), got {self.decoder_dropout}",
        )
        for ratio in ("mask_ratio", "mae_mask_ratio"):
            value = getattr(self, ratio)
            kept = int(self.num_patches * (1 - value))
            _require(
                0.0 < value < 1.0 and 1 <= kept < self.num_patches,
                f"{ratio} must keep 1 to {self.num_patches - 1} of {self.num_patches} patches, got {value}",
            )
        if self.pos_grid == "released":
            side = int(self.num_patches**0.5)
            _require(
                side * side == self.num_patches,
                f'pos_grid "released" needs a square number of patches, got {self.num_patches}; use "true"',
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a crop (without cls)."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_pixels(self) -> int:
        """P: values of one patch, 3 colours."""
        return 3 * self.patch_size**2

    @property
    def num_visible(self) -> int:
        """K: patches the LMIM masked branch keeps."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def target_width(self) -> int:
        """Features of one reconstructed patch."""
        return self.width if self.target == "teacher" else self.patch_pixels


_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        width=96, depth=4, heads=3, decoder_width=96, decoder_heads=3, decoder_ffn=384, mae_decoder_depth=2
    ),
    "small": {},
    "base": dict(width=768, heads=12, decoder_depth=8),
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The model configuration called `name`, with single fields replaced by `overrides`.

    Args:
        name: "tiny" (a few minutes on a CPU), "small" (released ViT-S) or "base" (released ViT-B).
    Raises:
        ValueError: unknown name, or an override that does not fit.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose from {', '.join(_PRESETS)}")
    return ModelConfig(**{**_PRESETS[name], **overrides})


@dataclass(frozen=True)
class GuidanceConfig:
    """Strength of the guidance view: the paper's "medium". Ranges are (low, high) of a uniform draw.

    Source: LMIM's released augmentation; the resize, jitter and grayscale that follow the sampled operations
    are part of the view.
    """

    min_operations: int = 3
    """Least operations of the ten that a view gets."""
    max_operations: int = 10
    """Most operations of the ten that a view gets."""
    contrast: tuple[float, float] = (0.5, 1.0)
    """Factor around 128."""
    blur_sigma: tuple[float, float] = (0.5, 1.5)
    """Gaussian sigma in pixels of the crop's own size, above 0 and at most 5."""
    crop_vertical: tuple[float, float] = (0.0, 0.10)
    """Share of the height cut at the top and at the bottom, each drawn, below 0.5."""
    crop_horizontal: tuple[float, float] = (0.0, 0.02)
    """Share of the width cut at the left and at the right, each drawn, below 0.5."""
    sharpen_alpha: tuple[float, float] = (0.0, 0.5)
    """Blend of the sharpened image."""
    sharpen_lightness: tuple[float, float] = (0.0, 0.5)
    """Lightness of the sharpening kernel's centre."""
    rotate_degrees: tuple[float, float] = (-15.0, 15.0)
    """Angle; the canvas grows to fit."""
    piecewise_scale: tuple[float, float] = (0.03, 0.05)
    """Standard deviation of the 4 x 4 control points' jitter, share of the side."""
    perspective_scale: tuple[float, float] = (0.02, 0.06)
    """Standard deviation of the corners' jitter, share of the side."""
    solarize_threshold: tuple[float, float] = (32.0, 128.0)
    """Threshold of the inversion, 0..255."""
    grayscale_alpha: tuple[float, float] = (0.0, 1.0)
    """Blend of the gray image."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation and hue of the colour jitter after the resize."""
    jitter_probability: float = 0.8
    """Share of the views that get the colour jitter."""
    grayscale_probability: float = 0.2
    """Share of the views that become gray after the jitter."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.min_operations <= self.max_operations <= 10,
            f"operations need 0 <= min <= max <= 10, got {self.min_operations} and {self.max_operations}",
        )
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, tuple) and len(value) == 2:
                _require(value[0] <= value[1], f"{item.name} must be (low, high), got {value}")
            if isinstance(value, tuple):
                _require(all(map(math.isfinite, value)), f"{item.name} must be finite, got {value}")
        self._require_between(0.0, 1.0, "sharpen_alpha", "grayscale_alpha")
        self._require_between(0.0, 1.0, "jitter_probability", "grayscale_probability")
        self._require_between(0.0, 255.0, "solarize_threshold")
        self._require_between(
            0.0, math.inf, "contrast", "sharpen_lightness", "piecewise_scale", "perspective_scale", "jitter"
        )
        for name in ("crop_vertical", "crop_horizontal"):
            low, high = getattr(self, name)
            _require(low >= 0.0 and high < 0.5, f"{name} must be in [0, 0.5), got {(low, high)}")
        low, high = self.blur_sigma
        _require(
            low > 0.0 and high <= MAX_BLUR_SIGMA,
            f"blur_sigma must be in (0, {MAX_BLUR_SIGMA:g}], got {self.blur_sigma}",
        )
        _require(self.jitter[3] <= 0.5, f"the hue of jitter must be at most 0.5 turns, got {self.jitter}")

    def _require_between(self, least: float, most: float, *names: str) -> None:
        """Refuse those of the named fields that leave [least, most]."""
        for name in names:
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            bounds = f"in [{least:g}, {most:g}]" if math.isfinite(most) else f">= {least:g}"
            _require(all(least <= part <= most for part in values), f"{name} must be {bounds}, got {value}")


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
        _require(self.threads >= 0, f"threads must be >= 0, got {self.threads}")
        _require(self.prefetch >= 1, f"prefetch must be >= 1, got {self.prefetch}")
        _require(
            0.0 <= self.max_bad_fraction <= 1.0,
            f"max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}",
        )
        _require(
            1 <= self.max_pixels <= MAX_PIXELS_LIMIT,
            f"max_pixels must be in [1, 2^40], got {self.max_pixels}",
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up from 0, half-cosine to 0, per step. Source: LMIM's recipe."""

    lr: float | None = None
    """Peak learning rate, taken as it is; None: base_lr x batch_size / 256."""
    base_lr: float = 1.5e-4
    """Peak learning rate per 256 images, used when lr is None."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moment decays."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.05
    """Decoupled decay of tensors with two or more dimensions (so cls and mask token too)."""
    warmup_epochs: float = 1.0
    """Linear warm-up length in epochs, used when warmup_steps is None."""
    warmup_steps: int | None = None
    """Linear warm-up length in steps."""
    clip_norm: float | None = None
    """Largest global gradient norm; None: no clipping, as released."""

    def __post_init__(self) -> None:
        _require(self.lr is None or self.lr > 0, f"lr must be positive, got {self.lr}")
        _require(self.base_lr > 0, f"base_lr must be positive, got {self.base_lr}")
        _require(self.weight_decay >= 0, f"weight_decay must be >= 0, got {self.weight_decay}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"betas must be in [0, 1), got {self.betas}")
        _require(self.eps > 0, f"eps must be positive, got {self.eps}")
        _require(self.warmup_epochs >= 0, f"warmup_epochs must be >= 0, got {self.warmup_epochs}")
        _require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"warmup_steps must be >= 0, got {self.warmup_steps}",
        )
        _require(
            self.clip_norm is None or self.clip_norm > 0, f"clip_norm must be positive, got {self.clip_norm}"
        )


@dataclass(frozen=True)
class PretrainConfig:
    """One pre-training run."""

    data: tuple[str, ...]
    """LMDB folders, or folders that hold LMDB folders at any depth."""
    output: str = "runs/pretrain"
    """Run folder: config.json, metrics.jsonl, checkpoints/, tensorboard/."""
    objective: Objective = "lmim"
    """mae: the stage that makes a teacher; lmim: guided masked feature modelling."""
    preset: PresetName = "small"
    """Model size; single values of it can be overridden by the model options."""
    teacher: str | None = None
    """Encoder file for the LMIM teacher (released, MAERec or ours), or "random" for an ablation."""
    init: str | None = None
    """Encoder file that the student starts from (same kinds as teacher)."""
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
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model sizes and ablations."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    view: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Guidance view strength."""
    loader: DataConfig = field(default_factory=DataConfig)
    """Input pipeline."""

    def __post_init__(self) -> None:
        _require(len(self.data) > 0, "data must name at least one LMDB folder")
        for name in ("batch_size", "accumulation", "checkpoint_every", "keep_checkpoints", "log_every"):
            _require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        _require(self.steps is None or self.steps >= 1, f"steps must be >= 1, got {self.steps}")
        _require(self.epochs > 0, f"epochs must be positive, got {self.epochs}")
        _require_seed(self.seed)
        _require(
            not self.cuda_graph or self.accumulation == 1,
            f"cuda_graph needs accumulation 1, got {self.accumulation}",
        )
        _require(
            self.batch_size % self.accumulation == 0,
            f"batch_size {self.batch_size} must be a multiple of accumulation {self.accumulation}",
        )


@dataclass(frozen=True)
class RenderConfig:
    """The embedded default data: rendered words, written as an LMDB with labels."""

    output: str = "data/rendered"
    """Folder of the new LMDB; must not hold one already."""
    count: int = 5000
    """Crops to render."""
    seed: int = 0
    """Same seed, same crops."""
    fonts: str | None = None
    """Folder of .ttf/.otf/.ttc files to use in place of the fonts that come with matplotlib."""
    words: str | None = None
    """UTF-8 file, one word a line, in place of the built-in list (any script works, given a font)."""
    max_length: int = 25
    """Longest label in characters."""
    random_share: float = 0.25
    """Share of the labels that are random strings and numbers instead of words."""
    processes: int = 0
    """Rendering processes; 0 takes one per core."""

    def __post_init__(self) -> None:
        _require(self.count >= 1, f"count must be >= 1, got {self.count}")
        _require_seed(self.seed)
        _require(self.max_length >= 1, f"max_length must be >= 1, got {self.max_length}")
        _require(0.0 <= self.random_share <= 1.0, f"random_share must be in [0, 1], got {self.random_share}")
        _require(self.processes >= 0, f"processes must be >= 0, got {self.processes}")


@dataclass(frozen=True)
class ReportConfig:
    """What `lmim report` draws."""

    run: str
    """Run folder of a pre-training run."""
    output: str | None = None
    """HTML file to write; None: report.html in the run folder."""
    samples: int = 48
    """Crops on the sheet of plain and guidance views."""
    maps: int = 6
    """Crops with attention maps."""

    def __post_init__(self) -> None:
        _require(self.samples >= 1, f"samples must be >= 1, got {self.samples}")
        _require(self.maps >= 0, f"maps must be >= 0, got {self.maps}")
