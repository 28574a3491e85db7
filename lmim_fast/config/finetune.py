"""A fine-tuning run, and its two named recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lmim_fast.config.augment import AugmentConfig
from lmim_fast.config.checks import PathName, require
from lmim_fast.config.model import ModelConfig, preset
from lmim_fast.config.recognizer import RecognizerConfig
from lmim_fast.config.run import OptimConfig, RunConfig

RecipeName = Literal["lmim", "strong"]


@dataclass(frozen=True)
class LabelConfig:
    """What becomes of training labels that do not fit; all are counted and reported before training."""

    too_long: Literal["leave_out", "cut"] = "leave_out"
    """Labels of more characters than max_length - 1."""
    outside: Literal["unknown", "leave_out", "delete"] = "unknown"
    """Characters outside the set: the class UNK, or leave the record out, or delete the character."""


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """One fine-tuning run of the recogniser."""

    output: PathName = "runs/finetune"
    """Run folder: config.json, metrics.jsonl, validation.jsonl, checkpoints/, best/, tensorboard/."""
    objective: Literal["recognizer"] = "recognizer"
    """What is trained."""
    recipe: RecipeName = "lmim"
    """lmim: the released recipe; strong: the retraining of MAERec in OpenOCR. Other options override it."""
    init: PathName | None = None
    """Encoder or recogniser to start from: a file (ours, released LMIM or MAERec) or a run folder."""
    weights: tuple[float, ...] = ()
    """Share of each path of data in the samples of an epoch; empty: as many as it holds."""
    val: tuple[PathName, ...] = ()
    """LMDB folders to validate on while training; the best checkpoint is kept."""
    validate_every: int = 500
    """Steps between validations; one is always made at the end."""
    charset: PathName = "94"
    """36, 62 or 94 (printable ASCII), or a file with one character a line."""
    characters: str | None = None
    """The characters themselves, in the order of their classes; None: those of charset."""
    labels: LabelConfig = field(default_factory=LabelConfig)
    """Labels that do not fit."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of the crops."""
    model: RecognizerConfig = field(default_factory=RecognizerConfig)
    """Sizes, dropout and smoothing of the recogniser."""

    @property
    def encoder(self) -> ModelConfig:
        """Sizes of the encoder."""
        return self.model.encoder

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.validate_every >= 1, f"validate_every must be >= 1, got {self.validate_every}")
        require(
            not self.weights or len(self.weights) == len(self.data),
            f"weights must be one number for each of {len(self.data)} paths of data, got {len(self.weights)}",
        )
        require(all(weight > 0 for weight in self.weights), f"weights must be positive, got {self.weights}")


_DECODERS: dict[str, dict[str, int]] = {
    "tiny": dict(decoder_width=96, decoder_depth=2, decoder_heads=3, decoder_head_dim=32, decoder_ffn=192),
    "small": {},
    "base": {},
}
# lmim: the released fine-tuning. strong: OpenOCR's configuration of MAERec (AdamW 6.5e-4 at batch 1024,
# one-cycle with 1.5 epochs of warm-up, no layer-wise decay, PARSeq's augmentation).
_OPTIM: dict[str, dict[str, Any]] = {
    "lmim": dict(base_lr=1e-4, warmup_epochs=1.0, final_lr=1e-6, layer_decay=0.75),
    "strong": dict(base_lr=6.5e-4 / 4, warmup_epochs=1.5, schedule="one_cycle"),
}
_AUGMENT: dict[str, Literal["abinet", "parseq"]] = {"lmim": "abinet", "strong": "parseq"}


def recognizer_preset(name: str, **overrides: Any) -> RecognizerConfig:
    """The recogniser over the encoder that `config.preset(name)` gives, single fields replaced.

    Raises:
        ValueError: unknown name, or an override that does not fit.
    """
    return RecognizerConfig(encoder=preset(name), **{**_DECODERS[name], **overrides})


def recipe(name: RecipeName, *, data: tuple[str, ...], size: str = "small") -> FinetuneConfig:
    """The fine-tuning run of a named recipe, for a preset of the model.

    Raises:
        ValueError: unknown recipe or preset.
    """
    if name not in _OPTIM:
        raise ValueError(f"unknown recipe {name!r}; choose from {', '.join(_OPTIM)}")
    return FinetuneConfig(
        data=data,
        recipe=name,
        preset=size,  # type: ignore[arg-type]  # checked by recognizer_preset
        optim=OptimConfig(betas=(0.9, 0.999), **_OPTIM[name]),
        augment=AugmentConfig(kind=_AUGMENT[name]),
        model=recognizer_preset(size),
    )
