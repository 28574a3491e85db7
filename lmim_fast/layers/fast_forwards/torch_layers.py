"""torch.nn's LayerNorm, MultiheadAttention and Transformer layers, and their near relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmim_fast.layers.fast_forwards import read
from lmim_fast.layers.fast_forwards.form import Form
from lmim_fast.layers.fast_forwards.read import Linear, require
from lmim_fast.layers.fast_forwards.sublayers import (
    MOST_PADDED_KEYS,
    Attention,
    Branch,
    Mlp,
    add_branch,
    add_post_norm,
    norm_dtype,
)
from lmim_fast.layers.norm import fused_add_norm
from lmim_fast.ops.linear import compute_dtype
from lmim_fast.ops.norm import layer_norm

_CASTING = ("open_clip.", "timm.layers.norm.LayerNormFp32")  # the result is in the dtype of the input


def _layer_norm(self: Any, x: Tensor, /, *more: object, **named: object) -> Tensor:
    read.unset(*more, **named)
    norm = read.norm_of(self)
    casting = read.qualified(self).startswith(_CASTING)
    read.rows(self.normalized_shape[0], x, weights=() if casting else norm[:2], dims=None)
    return layer_norm(x, norm.weight, norm.bias, x.dtype if casting else norm_dtype(x), eps=norm.eps)


def _read_heads(module: Any) -> Attention:
    require(bool(module._qkv_same_embed_dim), "kdim or vdim differs from embed_dim")
    extra = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    require(not extra, "add_bias_kv or add_zero_attn is set")
    weight, bias = module._parameters.get("in_proj_weight"), module._parameters.get("in_proj_bias")
    ordinary = type(weight) in read.TENSORS and (bias is None or type(bias) in read.TENSORS)
    require(ordinary, "in_proj_weight is no ordinary parameter")
    p, out = read.dropout(module, "dropout"), read.linear(module, "out_proj")
    return Attention(Linear(weight, bias), module.num_heads, p, out, batch_first=module.batch_first)


def _keep_torchs(module: Any, heads: Attention, x: Tensor) -> None:
    """Raise `Left` where torch runs an inference path of its own for self-attention, in C++."""
    gradients = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *heads.weights)
    )
    own = not (module.training or gradients or torch.is_autocast_enabled(x.device.type))
    require(not (own and heads.batch_first and heads.heads % 2 == 0), "torch's own inference path")


def _check_batch(
    heads: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = False,
    padding: Tensor | None = None,
) -> None:
    """Check that queries, keys and values are of one batch, and the mask of keys."""
    batch = 0 if heads.batch_first else 1
    paired = key.shape == value.shape and query.shape[batch] == key.shape[batch]
    require(paired, "inputs of shapes {}, {}, {}", query.shape, key.shape, value.shape)
    if padding is not None:
        keys = key.shape[1 - batch]
        require(not causal, "a causal mask and key_padding_mask are given")
        require(type(padding) is Tensor and padding.dtype == torch.bool, "key_padding_mask is no bool tensor")
        require(padding.shape == (key.shape[batch], keys), "key_padding_mask has another shape")
        require(keys <= MOST_PADDED_KEYS, "key_padding_mask of more than {} keys", MOST_PADDED_KEYS)


def _multihead_attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    require(not need_weights, "need_weights is True, the default")
    heads, causal = _read_heads(self), _causal(attn_mask, is_causal, "attn_mask")
    read.rows(heads.width, query, key, value, weights=heads.weights)
    _check_batch(heads, query, key, value, causal, key_padding_mask)
    memory = None if query is key and key is value else (key, value)
    require(memory is None or not causal, "a causal mask over another sequence")
    if memory is None:
        _keep_torchs(self, heads, query)
    return heads.project(heads.context(query, memory, causal=causal, padding=key_padding_mask)), None


def _causal(mask: Tensor | None, is_causal: bool, name: str) -> bool:
    """Whether a mask is causal, which torch's flag promises; raises `Left` for any other mask."""
    require(mask is None or is_causal, "{} is given", name)
    require(mask is not None or not is_causal, "is_causal is given without {}", name)
    return is_causal


class _Layer:
    """What is read of an encoder or decoder layer."""

    def __init__(self, layer: Any, *attentions: str) -> None:
        numbers = range(1, len(attentions) + 2)
        self.norms = [read.norm(layer, f"norm{number}") for number in numbers]
        *drops, drop = (read.dropout(layer, f"dropout{number}") for number in numbers)
        self.attentions = [
            read.within(layer, name, "torch.MultiheadAttention", _read_heads)._replace(drop=p)
            for name, p in zip(attentions, drops, strict=True)
        ]
        first, second = read.linear(layer, "linear1", bias=True), read.linear(layer, "linear2")
        self.mlp = Mlp(
            first, read.activation(layer, "activation"), read.dropout(layer, "dropout"), second, drop
        )
        self.norm_first = bool(layer.norm_first)
        layouts = {each.batch_first for each in self.attentions}
        require(len(layouts) == 1, "its attentions differ in batch_first")

    def check(self, *inputs: Tensor) -> None:
        """Check the inputs against all weights."""
        norms = [tensor for norm in self.norms for tensor in norm[:2]]
        held = [tensor for each in self.attentions for tensor in each.weights]
        read.rows(self.mlp.width, *inputs, weights=(*norms, *held, *self.mlp.weights))

    def run(self, x: Tensor, *attentions: Callable[[Tensor], Branch]) -> Tensor:
        """Each branch is made without its bias, which the op that adds it to the residual stream takes."""
        steps = list(zip((*attentions, self.mlp.branch), self.norms, strict=True))
        if not self.norm_first:
            for branch_of, norm in steps:
                x = add_post_norm(branch_of(x), x, norm)
            return x
        dtype = compute_dtype(self.mlp.first.weight)
        branch = Branch(None, None, 0.0)  # type: ignore[arg-type]
        for branch_of, norm in steps:
            rows, x = fused_add_norm(x, branch.product, branch.bias, norm, dtype, p=branch.p)
            branch = branch_of(rows)
        return add_branch(x, branch)


def _read_encoder_layer(layer: Any) -> _Layer:
    return _Layer(layer, "self_attn")


def _encoder_layer(
    self: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    layer, causal = _read_encoder_layer(self), _causal(src_mask, is_causal, "src_mask")
    layer.check(src)
    (heads,), padding, device = layer.attentions, src_key_padding_mask, src.device.type
    _check_batch(heads, src, src, src, causal, padding)
    _keep_torchs(self.self_attn, heads, src)
    other = not self.training and device != "cuda" and torch.is_autocast_enabled(device)
    require(not other, "autocast on {} in evaluation", device)  # torch's result has another dtype there
    return layer.run(src, lambda x: heads.branch(x, causal=causal, padding=padding))


def _read_decoder_layer(layer: Any) -> _Layer:
    return _Layer(layer, "self_attn", "multihead_attn")


def _decoder_layer(
    self: Any,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> Tensor:
    read.unset(memory_mask=memory_mask, memory_is_causal=memory_is_causal)
    layer, causal = _read_decoder_layer(self), _causal(tgt_mask, tgt_is_causal, "tgt_mask")
    layer.check(tgt, memory)
    own, cross = layer.attentions
    _check_batch(own, tgt, tgt, tgt, causal, tgt_key_padding_mask)
    _check_batch(cross, tgt, memory, memory, padding=memory_key_padding_mask)
    return layer.run(
        tgt,
        lambda x: own.branch(x, causal=causal, padding=tgt_key_padding_mask),
        lambda x: cross.branch(x, memory=(memory, memory), padding=memory_key_padding_mask),
    )


def _read_released(layer: Any) -> _Layer:
    require(not layer.norm_first, "norm_first is set, and does nothing in it")
    return _read_decoder_layer(layer)


def _released_decoder_layer(self: Any, *inputs: Tensor | None, **masks: Tensor | None) -> Tensor:
    require(not self.norm_first, "norm_first is set, and does nothing in it")
    return _decoder_layer(self, *inputs, **masks)  # type: ignore[arg-type]


_STEPS = "_sa_block", "_mha_block", "_ff_block"
_RELEASED_STEPS = "_selfatt", "_crossatt", "_ffn"
FORMS = {
    "torch.LayerNorm": Form(read.norm_of, _layer_norm),
    "torch.MultiheadAttention": Form(_read_heads, _multihead_attention),
    "torch.TransformerEncoderLayer": Form(_read_encoder_layer, _encoder_layer, steps=_STEPS),
    "torch.TransformerDecoderLayer": Form(_read_decoder_layer, _decoder_layer, steps=_STEPS),
    "lmim.DecoderLayer": Form(_read_released, _released_decoder_layer, steps=_RELEASED_STEPS),
}
CLASSES = {
    "torch.nn.modules.normalization.LayerNorm": "torch.LayerNorm",
    "timm.layers.norm.LayerNorm": "torch.LayerNorm",
    "timm.layers.norm.LayerNormFp32": "torch.LayerNorm",
    "timm.models.layers.norm.LayerNorm": "torch.LayerNorm",
    "open_clip.transformer.LayerNorm": "torch.LayerNorm",
    "open_clip.transformer.LayerNormFp32": "torch.LayerNorm",
    "torch.nn.modules.activation.MultiheadAttention": "torch.MultiheadAttention",
    "torch.nn.modules.transformer.TransformerEncoderLayer": "torch.TransformerEncoderLayer",
    "torch.nn.modules.transformer.TransformerDecoderLayer": "torch.TransformerDecoderLayer",
    "models_lmim.LMIMDecoder": "lmim.DecoderLayer",
}
