"""Sizes and switches of the models, and their named presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lmim_fast.config.checks import require, require_size

PresetName = Literal["tiny", "small", "base"]


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
            "decoder_ffn",
            "mae_decoder_depth",
        ):
            require_size(name, getattr(self, name))
        narrowest = min(self.width, self.decoder_width)  # the MAE stage's decoder uses the ratio too
        require(
            1 <= narrowest * self.mlp_ratio <= narrowest * 1000,
            f"mlp_ratio must be at most 1000 and give a unit at width {narrowest}, got {self.mlp_ratio}",
        )
        require(
            0 < height <= 2**16
            and 0 < width <= 2**16
            and height % self.patch_size == 0
            and width % self.patch_size == 0,
            f"image_size {self.image_size} must be positive multiples of patch_size {self.patch_size}",
        )
        for name, heads in (("width", self.heads), ("decoder_width", self.decoder_heads)):
            value = getattr(self, name)
            require(value % heads == 0, f"{name} {value} must be a multiple of its {heads} heads")
            require(value % 4 == 0, f"{name} {value} must be a multiple of 4 (2-D sin-cos positions)")
        require(
            0.0 <= self.decoder_dropout < 1.0,
            f"decoder_dropout must be in [0, 1), got {self.decoder_dropout}",
        )
        for ratio in ("mask_ratio", "mae_mask_ratio"):
            value = getattr(self, ratio)
            kept = int(self.num_patches * (1 - value)) if 0.0 < value < 1.0 else 0
            require(
                1 <= kept < self.num_patches,
                f"{ratio} must keep 1 to {self.num_patches - 1} of {self.num_patches} patches, got {value}",
            )
        if self.pos_grid == "released":
            side = int(self.num_patches**0.5)
            require(
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
    def mae_num_visible(self) -> int:
        """K: patches the MAE stage keeps."""
        return int(self.num_patches * (1 - self.mae_mask_ratio))

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
