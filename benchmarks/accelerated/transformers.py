"""Models of Hugging Face's transformers, open_clip and PyTorch's own transformer layers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accelerated.sizes import Builder, Built, Size, ids, images, sequence

MODELS: dict[str, Builder] = {}


def _model(name: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        MODELS[name] = builder
        return builder

    return register


def _hugging_face(size: Size, random: bool, config: str, model: str, **options: Any) -> Built:
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
    return getattr(transformers, model)(settings), (images(size),), {}


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
def _vit_mae(size: Size, random: bool) -> Built:
    decoder = dict(
        decoder_hidden_size=size.width,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=size.heads,
        decoder_intermediate_size=4 * size.width,
    )
    model, inputs, _ = _hugging_face(size, random, "ViTMAEConfig", "ViTMAEForPreTraining", **decoder)
    return model, inputs, {"noise": torch.rand(size.batch, size.tokens)}


def _bert(size: Size, random: bool, mask: bool) -> Built:
    vocabulary = dict(vocab_size=100, max_position_embeddings=size.tokens)
    model, _, _ = _hugging_face(size, random, "BertConfig", "BertModel", **vocabulary)
    options = {}
    if mask:
        options["attention_mask"] = torch.ones(size.batch, size.tokens, dtype=torch.long)
        options["attention_mask"][0, -1] = 0
    return model, (ids(size),), options


MODELS["HF BERT"] = functools.partial(_bert, mask=False)
MODELS["HF BERT, attention mask"] = functools.partial(_bert, mask=True)


def _clip_vision(size: Size, random: bool, **options: Any) -> Built:
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
    return model, (images(size),), {}


MODELS["open_clip vision"] = _clip_vision
MODELS["open_clip vision, LayerScale"] = functools.partial(_clip_vision, ls_init_value=1.0)


@_model("open_clip vision, fp32 norms")
def _clip_fp32(size: Size, random: bool) -> Built:
    norm = importlib.import_module("open_clip.transformer").LayerNormFp32
    return _clip_vision(size, random, norm_layer=norm)


@_model("open_clip text")
def _clip_text(size: Size, random: bool) -> Built:
    module = importlib.import_module("open_clip.transformer")
    model = module.TextTransformer(
        context_length=size.tokens,
        vocab_size=100,
        width=size.width,
        heads=size.heads,
        layers=size.depth,
        output_dim=size.width,
    )
    return model, (ids(size),), {}


def _masks(size: Size) -> tuple[Tensor, Tensor]:
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
) -> Built:
    layer = _torch_layer(size, random, "Encoder", norm_first, activation)
    model = nn.TransformerEncoder(layer, size.depth, enable_nested_tensor=False)
    causal, padding = _masks(size)
    options: dict[str, dict[str, Any]] = {
        "": {},
        "causal": {"mask": causal, "is_causal": True},
        "padding": {"src_key_padding_mask": padding},
    }
    return model, (sequence(size),), options[mask]


def _decoder(
    size: Size, random: bool, norm_first: bool = False, activation: str = "relu", mask: str = ""
) -> Built:
    layer = _torch_layer(size, random, "Decoder", norm_first, activation)
    model = nn.TransformerDecoder(layer, size.depth)
    causal, padding = _masks(size)
    options: dict[str, dict[str, Any]] = {
        "": {},
        "causal": {"tgt_mask": causal, "tgt_is_causal": True},
        "padding": {"memory_key_padding_mask": padding},
    }
    return model, (sequence(size), sequence(size)), options[mask]


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
