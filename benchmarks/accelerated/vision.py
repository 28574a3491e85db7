"""Vision models of timm, DINOv2, the public MAE, the released LMIM and torchvision."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.accelerated.sizes import Builder, Built, Size, images

MODELS: dict[str, Builder] = {}


def _model(name: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        MODELS[name] = builder
        return builder

    return register


def _timm(size: Size, random: bool, name: str, **options: Any) -> Built:
    timm = importlib.import_module("timm")
    vit = dict(img_size=size.image, embed_dim=size.width, depth=size.depth, num_heads=size.heads)
    drop_path = 0.1 if random else 0.0
    model = timm.create_model(
        name, num_classes=10, patch_size=size.patch, drop_path_rate=drop_path, **vit | options
    )
    return model, (images(size),), {}


for _title, _name, _options in (
    ("timm ViT", "vit_small_patch16_224", {}),
    ("timm DeiT III", "deit3_small_patch16_224", {}),
    ("timm ViT, q/k norm", "vit_small_patch16_224", {"qk_norm": True}),
    ("timm ViT, 4 registers", "vit_small_patch16_224", {"reg_tokens": 4}),
    ("timm DINOv2", "vit_small_patch14_dinov2", {}),
):
    MODELS[_title] = functools.partial(_timm, name=_name, **_options)


def _hierarchical(size: Size, random: bool, name: str, **options: Any) -> Built:
    timm = importlib.import_module("timm")
    drop_path = 0.1 if random else 0.0
    model = timm.create_model(name, num_classes=10, drop_path_rate=drop_path, **options)
    return model, (torch.randn(size.batch, 3, max(64, size.image), max(64, size.image)),), {}


@_model("timm Swin")
def _swin(size: Size, random: bool) -> Built:
    layout = dict(embed_dim=size.width // 4, depths=(size.depth, size.depth), num_heads=(2, 4))
    image = max(64, size.image)
    return _hierarchical(
        size, random, "swin_tiny_patch4_window7_224", img_size=image, window_size=4, **layout
    )


@_model("timm ConvNeXt")
def _convnext(size: Size, random: bool) -> Built:
    layout = dict(depths=(1, 1, size.depth, 1), dims=[size.width // 4 * times for times in (1, 1, 2, 2)])
    return _hierarchical(size, random, "convnext_atto", **layout)


@_model("DINOv2")
def _dinov2(size: Size, random: bool) -> Built:
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
    return model, (images(size),), {"is_training": True}


@_model("MAE")
def _mae(size: Size, random: bool) -> Built:
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
    return model, (images(size),), {}


@_model("LMIM, released")
def _lmim(size: Size, random: bool) -> Built:
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
    return model, (images(size), images(size)), {}


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0


@_model("torchvision ViT")
def _torchvision(size: Size, random: bool) -> Built:
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
    return model, (images(size),), {}
