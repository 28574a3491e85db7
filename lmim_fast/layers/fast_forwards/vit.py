"""timm's Attention, Mlp and Block, DINOv2's of the same parts, and MAE's random_masking."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers import parts
from lmim_fast.layers.fast_forwards import read
from lmim_fast.layers.fast_forwards.form import Form, Left
from lmim_fast.layers.fast_forwards.read import Linear, Norm, require
from lmim_fast.layers.fast_forwards.sublayers import (
    Attention,
    Branch,
    Mlp,
    attend,
    attend_normed,
    feed_forward,
    finish,
    pre_norm_block,
    project,
)
from lmim_fast.ops import dispatch
from lmim_fast.ops.linear import compute_dtype
from lmim_fast.ops.masking import gather_rows, select_patches


def _read_attention(module: Any) -> Attention:
    read.holds_only(module, "qkv", "proj", "attn_drop", "proj_drop", "q_norm", "k_norm", "norm", "gate")
    qkv, proj, heads = read.linear(module, "qkv"), read.linear(module, "proj"), module.num_heads
    read.absent(module, "norm", "gate")
    width = len(qkv.weight) // 3
    require(
        len(qkv.weight) == 3 * heads * (width // heads), "{} heads for qkv of {} rows", heads, len(qkv.weight)
    )
    scale = getattr(module, "scale", None)
    require(scale is None or abs(scale * (width // heads) ** 0.5 - 1) < 1e-6, "its scale is {}", scale)
    p, drop = read.dropout(module, "attn_drop"), read.dropout(module, "proj_drop")
    require(
        not p or type(module).__name__ != "MemEffAttention", "xformers has no dropout of attention weights"
    )
    norms = read.called(module, "q_norm"), read.called(module, "k_norm")
    return Attention(qkv, heads, p, proj, drop, *norms)


def _attention(self: Any, x: Tensor, /, *masks: object, is_causal: bool = False, **options: object) -> Tensor:
    causal = _causal(masks, is_causal, options)
    attention = _read_attention(self)
    read.rows(attention.qkv.weight.shape[1], x, weights=attention.weights)
    if attention.q_norm is None and attention.k_norm is None:
        context = attend(x, attention.qkv, attention.heads, attention.p, causal=causal)
    else:
        context = attend_normed(x, attention, causal)
    return _dropped(project(context, attention.proj), attention.drop)


def _causal(masks: tuple[object, ...], is_causal: bool, options: dict[str, object]) -> bool:
    """Whether timm's arguments (attn_mask, is_causal) ask for a causal mask; raises `Left` for any other."""
    read.unset(*masks[:1], *masks[2:], **options)
    flags = *masks[1:2], is_causal
    require(all(isinstance(flag, bool) for flag in flags), "is_causal is {}", flags[0])
    return any(flags)


def _dropped(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p else x


def _read_mlp(module: Any) -> Mlp:
    read.holds_only(module, "fc1", "act", "drop", "drop1", "norm", "fc2", "drop2")
    read.absent(module, "norm")
    return Mlp(
        read.linear(module, "fc1", bias=True),
        read.activation(module, "act"),
        read.dropout(module, "drop1", "drop"),
        read.linear(module, "fc2"),
        read.dropout(module, "drop2", "drop"),
    )


def _mlp(self: Any, x: Tensor, /, *more: object, **named: object) -> Tensor:
    read.unset(*more, **named)
    layer = _read_mlp(self)
    read.rows(layer.first.weight.shape[1], x, weights=layer.weights, dims=None)
    return finish(Branch(feed_forward(x, layer), layer.second.bias, layer.drop))


class _Block(NamedTuple):
    norm1: Norm
    attention: Attention
    path1: Any
    norm2: Norm
    mlp: Mlp
    path2: Any


def _read_block(block: Any) -> _Block:
    paths = "ls1", "drop_path1", "ls2", "drop_path2", "drop_path"
    read.holds_only(block, "norm1", "attn", "norm2", "mlp", *paths)
    attention = read.within(block, "attn", "timm.Attention", _read_attention)
    mlp = read.within(block, "mlp", "timm.Mlp", _read_mlp)
    return _Block(
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
    gamma = read.known(block, name, "LayerScale").gamma
    bias = None if linear.bias is None else linear.bias * gamma
    return Linear(linear.weight * gamma[:, None], bias)


def _scales(block: Any) -> bool:
    """Whether a block has a LayerScale."""
    return any(type(read.child(block, name)) not in (type(None), nn.Identity) for name in ("ls1", "ls2"))


def _block(self: Any, x: Tensor, /, *masks: object, is_causal: bool = False, **options: object) -> Tensor:
    causal = _causal(masks, is_causal, options)
    subset = self.training and getattr(self, "sample_drop_ratio", 0.0) > 0
    require(not subset, "DINOv2's stochastic depth")
    block = _read_block(self)
    half = compute_dtype(block.mlp.first.weight) is torch.float16
    require(not (half and _scales(self)), "LayerScale in float16, in which weights times it vanish")
    weights = *block.norm1[:2], *block.attention.weights, *block.norm2[:2], *block.mlp.weights
    read.rows(block.attention.qkv.weight.shape[1], x, weights=weights)
    return pre_norm_block(x, *block, causal=causal)


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
    "timm.Attention": Form(_read_attention, _attention),
    "timm.Mlp": Form(_read_mlp, _mlp),
    "timm.Block": Form(_read_block, _block),
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
