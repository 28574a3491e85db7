"""timm's Attention, Mlp and Block, DINOv2's of the same parts, torchvision's MLPBlock, MAE's masking."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmim_fast.layers import parts
from lmim_fast.layers.fast_forwards import read
from lmim_fast.layers.fast_forwards.form import Form, Left
from lmim_fast.layers.fast_forwards.read import Linear, check_heads, require
from lmim_fast.layers.fast_forwards.sublayers import Attention, Block, Mlp, sublayer_form
from lmim_fast.ops import dispatch
from lmim_fast.ops.linear import compute_dtype
from lmim_fast.ops.masking import gather_rows, select_patches


def _read_attention(module: Any) -> Attention:
    read.holds_only(module, "qkv", "proj", "attn_drop", "proj_drop", "q_norm", "k_norm", "norm", "gate")
    qkv, proj, heads = read.linear(module, "qkv"), read.linear(module, "proj"), module.num_heads
    read.absent(module, "norm", "gate")
    check_heads(len(qkv.weight), heads, getattr(module, "scale", None))
    p, drop = read.dropout(module, "attn_drop"), read.dropout(module, "proj_drop")
    xformers = type(module).__name__ == "MemEffAttention"
    require(not (p and xformers), "xformers has no dropout of attention weights")
    norms = read.called(module, "q_norm"), read.called(module, "k_norm")
    return Attention(qkv, heads, p, proj, drop, *norms)


def _causal(self: Any, *masks: object, is_causal: object = False, **options: object) -> bool:
    """Whether timm's arguments (attn_mask, is_causal) ask for a causal mask; raises `Left` for any other."""
    read.unset(*masks[:1], *masks[2:], **options)
    flags = *masks[1:2], is_causal
    require(all(isinstance(flag, bool) for flag in flags), "is_causal is {}", flags[0])
    return any(flags)


def _read_mlp(module: Any) -> Mlp:
    read.holds_only(module, "fc1", "act", "drop", "drop1", "norm", "fc2", "drop2")
    read.absent(module, "norm")
    first, second = read.linear(module, "fc1", bias=True), read.linear(module, "fc2")
    p, drop = read.dropout(module, "drop1", "drop"), read.dropout(module, "drop2", "drop")
    return Mlp(first, read.activation(module, "act"), p, second, drop)


def _read_mlp_block(module: Any) -> Mlp:
    require(list(module._modules) == ["0", "1", "2", "3", "4"], "has {} parts", len(module._modules))
    first, second = read.linear(module, "0", bias=True), read.linear(module, "3")
    p, drop = read.dropout(module, "2"), read.dropout(module, "4")
    return Mlp(first, read.activation(module, "1"), p, second, drop)


def _plain(self: Any, *more: object, **options: object) -> bool:
    """Not causal; raises `Left` if more than the input is given."""
    read.unset(*more, **options)
    return False


def _read_block(block: Any) -> Block:
    paths = "ls1", "drop_path1", "ls2", "drop_path2", "drop_path"
    read.holds_only(block, "norm1", "attn", "norm2", "mlp", *paths)
    attention = read.within(block, "attn", "timm.Attention", _read_attention)
    mlp = read.within(block, "mlp", "timm.Mlp", _read_mlp)
    return Block(
        read.norm(block, "norm1"),
        attention._replace(proj=_scaled(block, "ls1", attention.proj)),
        read.called(block, "drop_path1", "drop_path"),
        read.norm(block, "norm2"),
        mlp._replace(second=_scaled(block, "ls2", mlp.second)),
        read.called(block, "drop_path2", "drop_path"),
    )


def _scaled(block: Any, name: str, linear: Linear) -> Linear:
    """The linear with a LayerScale behind it in its weights, which costs less than a pass over the rows."""
    part = read.child(block, name)
    if part is None or parts.is_plain(part, nn.Identity):
        return linear
    gamma, half = read.known(block, name, "LayerScale").gamma, compute_dtype(linear.weight) is torch.float16
    require(not half, "LayerScale in float16, in which weights times it vanish")
    bias = None if linear.bias is None else linear.bias * gamma
    return Linear(linear.weight * gamma[:, None], bias)


def _causal_block(self: Any, *masks: object, **options: Any) -> bool:
    subset = self.training and getattr(self, "sample_drop_ratio", 0.0) > 0
    require(not subset, "DINOv2's stochastic depth")
    return _causal(self, *masks, **options)


def _random_masking(self: Any, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same draw, mask and unshuffled result without sorting twice; kept patches come in reading order.

    x (B, L, D) to kept rows (B, K, D), mask (B, L) with 1 for masked, ids_restore (B, L).
    """
    patches = x.shape[1]
    kept = int(patches * (1 - mask_ratio))
    read.rows(x.shape[-1], x, weights=())
    require(1 <= kept < patches, "mask_ratio is {}", mask_ratio)
    noise = torch.rand(x.shape[0], patches, device=x.device)
    ids_visible, ids_masked = select_patches(noise, kept)
    places = torch.arange(patches, device=x.device).expand(x.shape[0], -1)
    order = torch.cat([ids_visible, ids_masked], dim=1)
    ids_restore = torch.empty_like(order).scatter_(1, order, places)
    return gather_rows(x, ids_visible), (ids_restore >= kept).to(noise.dtype), ids_restore


def _try_masking(module: Any) -> None:
    """Many models that began as the public MAE have kept the names of its file and class, not its masking."""
    x = torch.arange(24.0, device="cpu").view(2, 6, 2)
    results = []
    for masking in (type(module).random_masking, _random_masking):
        try:
            with torch.random.fork_rng(devices=()), dispatch.backend("eager"):
                kept, mask, restore = masking(module, x, 0.5)
            places = restore[:, :, None].expand(x.shape)
            results.append((torch.cat([kept, torch.zeros_like(kept)], 1).gather(1, places), mask))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise Left("its random_masking is another: {}", error) from None
    same = all(torch.equal(own, fast) for own, fast in zip(*results, strict=True))
    require(same, "its random_masking is another: it gives other results")


FORMS = {
    "timm.Attention": sublayer_form(_read_attention, _causal),
    "timm.Mlp": sublayer_form(_read_mlp, _plain),
    "timm.Block": sublayer_form(_read_block, _causal_block),
    "torchvision.MLPBlock": sublayer_form(_read_mlp_block, _plain),
    "mae.random_masking": Form(_try_masking, _random_masking, "random_masking"),
}
CLASSES = {
    "timm.layers.attention.Attention": "timm.Attention",
    "timm.models.vision_transformer.Attention": "timm.Attention",
    "timm.layers.mlp.Mlp": "timm.Mlp",
    "timm.models.layers.mlp.Mlp": "timm.Mlp",
    "timm.models.vision_transformer.Mlp": "timm.Mlp",
    "timm.models.vision_transformer.Block": "timm.Block",
    "dinov2.layers.attention.Attention": "timm.Attention",
    "dinov2.layers.attention.MemEffAttention": "timm.Attention",
    "dinov2.layers.mlp.Mlp": "timm.Mlp",
    "dinov2.layers.block.Block": "timm.Block",
    "dinov2.layers.block.NestedTensorBlock": "timm.Block",
    "torchvision.models.vision_transformer.MLPBlock": "torchvision.MLPBlock",
    "models_mae.MaskedAutoencoderViT": "mae.random_masking",
    "models_lmim.MAEEncoder": "mae.random_masking",
}
PARTS = {
    "timm.layers.layer_scale.LayerScale": "LayerScale",
    "timm.models.vision_transformer.LayerScale": "LayerScale",
    "dinov2.layers.layer_scale.LayerScale": "LayerScale",
    "timm.layers.drop.DropPath": "drop path",
    "timm.models.layers.drop.DropPath": "drop path",
    "dinov2.layers.drop_path.DropPath": "drop path",
}
