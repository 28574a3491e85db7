"""Third-party models that `accelerate` is checked and timed on, with random weights.

A builder imports its library when it is called: a model whose library is missing raises ImportError.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """What a model is scaled to; images are square."""

    width: int
    heads: int
    depth: int
    image: int
    patch: int
    batch: int

    @property
    def tokens(self) -> int:
        """Patches of an image, and the length of a sequence."""
        return (self.image // self.patch) ** 2


SIZES = {
    "tiny": Size(width=64, heads=2, depth=1, image=16, patch=8, batch=1),
    "small": Size(width=64, heads=2, depth=2, image=32, patch=8, batch=2),
    "working": Size(width=384, heads=6, depth=2, image=160, patch=16, batch=4),
}


@dataclass
class Subject:
    """A model and what it is called with.

    inputs:  by position: images (B, 3, S, S), sequences (B, N, D) or token ids (B, N).
    options: further arguments by name.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    options: dict[str, Any]

    def __call__(self) -> list[Tensor]:
        """Every floating tensor that the model returns."""
        return tensors(self.model(*self.inputs, **self.options))


Builder = Callable[[Size, bool], tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]]
MODELS: dict[str, Builder] = {}


def subject(name: str, size: Size, *, random: bool = False, dtype: torch.dtype = torch.float32) -> Subject:
    """The model `name` at a size, in training mode, with weights off their initial values.

    Args:
        name:   of `MODELS`.
        size:   of `SIZES`, or another.
        random: keep the model's own dropout and drop path; False: both are 0.
        dtype:  of parameters and of floating inputs.
    Raises:
        ImportError: the library is not installed.
    """
    torch.manual_seed(0)
    model, inputs, options = MODELS[name](size, random)
    _move(model)
    model.to(dtype).train()
    cast = tuple(each.to(dtype) if each.is_floating_point() else each for each in inputs)
    options = {key: value.to(dtype) if _is_real(value) else value for key, value in options.items()}
    return Subject(model, cast, options)


def tensors(value: Any) -> list[Tensor]:
    """The floating tensors in tuples, lists, dicts and dataclasses of them, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):  # of Hugging Face too
        value = list(value.values())
    return [each for part in value for each in tensors(part)] if isinstance(value, list | tuple) else []


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@torch.no_grad()
def _move(model: nn.Module) -> None:
    """Give matrices and embeddings variance 1 / fan-in, and move vectors."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def _model(name: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        MODELS[name] = builder
        return builder

    return register


def _images(size: Size) -> Tensor:
    return torch.randn(size.batch, 3, size.image, size.image)


def _sequence(size: Size) -> Tensor:
    return torch.randn(size.batch, size.tokens, size.width)


def _timm(size: Size, random: bool, name: str, **options: Any) -> Any:
    timm = importlib.import_module("timm")
    vit = dict(img_size=size.image, embed_dim=size.width, depth=size.depth, num_heads=size.heads)
    drop_path = 0.1 if random else 0.0
    model = timm.create_model(
        name, num_classes=10, patch_size=size.patch, drop_path_rate=drop_path, **vit | options
    )
    return model, (_images(size),), {}


for _title, _name, _options in (
    ("timm ViT", "vit_small_patch16_224", {}),
    ("timm DeiT III", "deit3_small_patch16_224", {}),
    ("timm ViT, q/k norm", "vit_small_patch16_224", {"qk_norm": True}),
    ("timm ViT, 4 registers", "vit_small_patch16_224", {"reg_tokens": 4}),
    ("timm DINOv2", "vit_small_patch14_dinov2", {}),
):
    MODELS[_title] = functools.partial(_timm, name=_name, **_options)


def _hierarchical(size: Size, random: bool, name: str, **options: Any) -> Any:
    timm = importlib.import_module("timm")
    drop_path = 0.1 if random else 0.0
    model = timm.create_model(name, num_classes=10, drop_path_rate=drop_path, **options)
    return model, (torch.randn(size.batch, 3, max(64, size.image), max(64, size.image)),), {}


@_model("timm Swin")
def _swin(size: Size, random: bool) -> Any:
    layout = dict(embed_dim=size.width // 4, depths=(size.depth, size.depth), num_heads=(2, 4))
    image = max(64, size.image)
    return _hierarchical(
        size, random, "swin_tiny_patch4_window7_224", img_size=image, window_size=4, **layout
    )


@_model("timm ConvNeXt")
def _convnext(size: Size, random: bool) -> Any:
    layout = dict(depths=(1, 1, size.depth, 1), dims=[size.width // 4 * times for times in (1, 1, 2, 2)])
    return _hierarchical(size, random, "convnext_atto", **layout)


@_model("DINOv2")
def _dinov2(size: Size, random: bool) -> Any:
    module = importlib.import_module("dinov2.models.vision_transformer")
    model = module.vit_small(
        img_size=size.image,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        init_values=1.0,
        drop_path_rate=0.1 if random else 0.0,
        block_chunks=0,
    )
    return model, (_images(size),), {"is_training": True}


@_model("MAE")
def _mae(size: Size, random: bool) -> Any:
    model = importlib.import_module("models_mae").MaskedAutoencoderViT(
        img_size=size.image,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        decoder_embed_dim=size.width,
        decoder_depth=1,
        decoder_num_heads=size.heads,
    )
    return model, (_images(size),), {}


@_model("LMIM, released")
def _lmim(size: Size, random: bool) -> Any:
    released = importlib.import_module("models_lmim")
    model = released.LMIMViT(
        img_size=(size.image, size.image),
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        decoder_embed_dim=size.width,
        decoder_depth=size.depth,
        decoder_num_heads=size.heads,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )
    if not random:
        _without_dropout(model)
    return model, (_images(size), _images(size)), {}


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0


def _hugging_face(size: Size, random: bool, config: str, model: str, **options: Any) -> Any:
    transformers = importlib.import_module("transformers")
    dropout = 0.1 if random else 0.0
    settings = getattr(transformers, config)(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        image_size=size.image,
        patch_size=size.patch,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **options,
    )
    return getattr(transformers, model)(settings), (_images(size),), {}


for _title, _kind, _options in (
    ("HF ViT", "ViT", {}),
    ("HF ViT, eager attention", "ViT", {"attn_implementation": "eager"}),
    ("HF TrOCR encoder, ViT", "ViT", {"qkv_bias": False}),
    ("HF TrOCR encoder, DeiT", "DeiT", {}),
):
    MODELS[_title] = functools.partial(
        _hugging_face, config=f"{_kind}Config", model=f"{_kind}Model", **_options
    )


@_model("HF ViTMAE")
def _vit_mae(size: Size, random: bool) -> Any:
    decoder = dict(
        decoder_hidden_size=size.width,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=size.heads,
        decoder_intermediate_size=4 * size.width,
    )
    model, inputs, _ = _hugging_face(size, random, "ViTMAEConfig", "ViTMAEForPreTraining", **decoder)
    return model, inputs, {"noise": torch.rand(size.batch, size.tokens)}


def _bert(size: Size, random: bool, mask: bool) -> Any:
    vocabulary = dict(vocab_size=100, max_position_embeddings=size.tokens)
    model, _, _ = _hugging_face(size, random, "BertConfig", "BertModel", **vocabulary)
    options = {}
    if mask:
        options["attention_mask"] = torch.ones(size.batch, size.tokens, dtype=torch.long)
        options["attention_mask"][0, -1] = 0
    return model, (torch.randint(100, (size.batch, size.tokens)),), options


MODELS["HF BERT"] = functools.partial(_bert, mask=False)
MODELS["HF BERT, attention mask"] = functools.partial(_bert, mask=True)


def _clip_vision(size: Size, random: bool, **options: Any) -> Any:
    module = importlib.import_module("open_clip.transformer")
    model = module.VisionTransformer(
        image_size=size.image,
        patch_size=size.patch,
        width=size.width,
        layers=size.depth,
        heads=size.heads,
        mlp_ratio=4.0,
        output_dim=size.width,
        **options,
    )
    return model, (_images(size),), {}


MODELS["open_clip vision"] = _clip_vision
MODELS["open_clip vision, LayerScale"] = functools.partial(_clip_vision, ls_init_value=1.0)


@_model("open_clip vision, fp32 norms")
def _clip_fp32(size: Size, random: bool) -> Any:
    norm = importlib.import_module("open_clip.transformer").LayerNormFp32
    return _clip_vision(size, random, norm_layer=norm)


@_model("open_clip text")
def _clip_text(size: Size, random: bool) -> Any:
    module = importlib.import_module("open_clip.transformer")
    model = module.TextTransformer(
        context_length=size.tokens,
        vocab_size=100,
        width=size.width,
        heads=size.heads,
        layers=size.depth,
        output_dim=size.width,
    )
    return model, (torch.randint(100, (size.batch, size.tokens)),), {}


@_model("torchvision ViT")
def _torchvision(size: Size, random: bool) -> Any:
    module = importlib.import_module("torchvision.models.vision_transformer")
    model = module.VisionTransformer(
        image_size=size.image,
        patch_size=size.patch,
        num_layers=size.depth,
        num_heads=size.heads,
        hidden_dim=size.width,
        mlp_dim=4 * size.width,
        dropout=0.1 if random else 0.0,
        num_classes=10,
    )
    return model, (_images(size),), {}


def _masks(size: Size, mask: str) -> tuple[Tensor, Tensor]:
    causal = nn.Transformer.generate_square_subsequent_mask(size.tokens)
    padding = torch.zeros(size.batch, size.tokens, dtype=torch.bool)
    padding[0, -1:] = True
    return causal, padding


def _torch_layer(size: Size, random: bool, kind: str, norm_first: bool, activation: str) -> Any:
    layer = getattr(nn, f"Transformer{kind}Layer")(
        size.width,
        size.heads,
        4 * size.width,
        dropout=0.1 if random else 0.0,
        activation=activation,
        batch_first=True,
        norm_first=norm_first,
    )
    return layer


def _encoder(
    size: Size, random: bool, norm_first: bool = False, activation: str = "relu", mask: str = ""
) -> Any:
    layer = _torch_layer(size, random, "Encoder", norm_first, activation)
    model = nn.TransformerEncoder(layer, size.depth, enable_nested_tensor=False)
    causal, padding = _masks(size, mask)
    options = {
        "": {},
        "causal": {"mask": causal, "is_causal": True},
        "padding": {"src_key_padding_mask": padding},
    }
    return model, (_sequence(size),), options[mask]


def _decoder(
    size: Size, random: bool, norm_first: bool = False, activation: str = "relu", mask: str = ""
) -> Any:
    layer = _torch_layer(size, random, "Decoder", norm_first, activation)
    model = nn.TransformerDecoder(layer, size.depth)
    causal, padding = _masks(size, mask)
    options = {
        "": {},
        "causal": {"tgt_mask": causal, "tgt_is_causal": True},
        "padding": {"memory_key_padding_mask": padding},
    }
    return model, (_sequence(size), _sequence(size)), options[mask]


for _kind, _builder in (("encoder", _encoder), ("decoder", _decoder)):
    for _norm_first, _activation, _mask in (
        (False, "relu", ""),
        (False, "gelu", ""),
        (True, "gelu", ""),
        (True, "relu", ""),
        (False, "gelu", "causal"),
        (True, "gelu", "padding"),
    ):
        _words = ["pre-norm" if _norm_first else "post-norm", _activation, *([_mask] if _mask else [])]
        MODELS[f"torch {_kind}, {', '.join(_words)}"] = functools.partial(
            _builder, norm_first=_norm_first, activation=_activation, mask=_mask
        )
