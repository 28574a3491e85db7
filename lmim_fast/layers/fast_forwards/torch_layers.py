"""torch.nn's LayerNorm, MultiheadAttention and Transformer layers, and their near relatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmim_fast.layers.fast_forwards import read
from lmim_fast.layers.fast_forwards.form import Form
from lmim_fast.layers.fast_forwards.read import Linear, require
from lmim_fast.layers.fast_forwards.sublayers import (
    MOST_PADDED_KEYS,
    Branch,
    Mlp,
    add_branch,
    add_post_norm,
    attend,
    attend_memory,
    feed_forward,
    norm_dtype,
    project,
)
from lmim_fast.layers.norm import fused_add_norm
from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.norm import layer_norm

_CASTING = ("open_clip.", "timm.layers.norm.LayerNormFp32")  # the result is in the dtype of the input


def _layer_norm(self: Any, x: Tensor, /, *more: object, **named: object) -> Tensor:
    read.unset(*more, **named)
    norm = read.norm_of(self)
    casting = read.qualified(self).startswith(_CASTING)
    read.rows(self.normalized_shape[0], x, weights=() if casting else norm[:2], dims=None)
    return layer_norm(x, norm.weight, norm.bias, x.dtype if casting else norm_dtype(x), eps=norm.eps)


class _Heads:
    """What is read of an nn.MultiheadAttention."""

    def __init__(self, module: Any) -> None:
        require(bool(module._qkv_same_embed_dim), "kdim or vdim differs from embed_dim")
        extra = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
        require(not extra, "add_bias_kv or add_zero_attn is set")
        weight, bias = module._parameters.get("in_proj_weight"), module._parameters.get("in_proj_bias")
        ordinary = type(weight) in read.TENSORS and (bias is None or type(bias) in read.TENSORS)
        require(ordinary, "in_proj_weight is no ordinary parameter")
        self.qkv = Linear(weight, bias)
        self.out = read.linear(module, "out_proj")
        self.heads, self.batch_first = module.num_heads, module.batch_first
        self.p = read.dropout(module, "dropout")
        self.training = module.training

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """All that is read."""
        return *self.qkv, *self.out

    def keeps_torch(self, x: Tensor) -> None:
        """Raise `Left` where torch runs an inference path of its own for self-attention, in C++."""
        gradients = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (x, *self.weights)
        )
        autocast = torch.is_autocast_enabled(x.device.type)
        own = not self.training and not gradients and not autocast
        require(not (own and self.batch_first and self.heads % 2 == 0), "torch's own inference path")

    def check(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool = False, padding: Tensor | None = None
    ) -> None:
        """Check that queries, keys and values are of one batch, and the mask of keys."""
        batch = 0 if self.batch_first else 1
        paired = key.shape == value.shape and query.shape[batch] == key.shape[batch]
        require(paired, "inputs of shapes {}, {}, {}", query.shape, key.shape, value.shape)
        if padding is not None:
            keys = key.shape[1 - batch]
            require(not causal, "a causal mask and key_padding_mask are given")
            require(
                type(padding) is Tensor and padding.dtype == torch.bool, "key_padding_mask is no bool tensor"
            )
            require(padding.shape == (key.shape[batch], keys), "key_padding_mask has another shape")
            require(keys <= MOST_PADDED_KEYS, "key_padding_mask of more than {} keys", MOST_PADDED_KEYS)

    def attend(self, x: Tensor, causal: bool, padding: Tensor | None) -> Tensor:
        """Context of self-attention."""
        first = self.batch_first
        return attend(x, self.qkv, self.heads, self.p, causal=causal, padding=padding, batch_first=first)

    def attend_memory(self, x: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        """Context of attention over keys and values."""
        rest = self.qkv, self.heads, self.p
        return attend_memory(x, key, value, *rest, padding=padding, batch_first=self.batch_first)

    def branch(self, context: Tensor, p: float) -> Branch:
        """The output projection."""
        return Branch(linear(context, self.out.weight), self.out.bias, p)


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
    heads, causal = _Heads(self), _causal(attn_mask, is_causal, "attn_mask")
    read.rows(heads.qkv.weight.shape[1], query, key, value, weights=heads.weights)
    heads.check(query, key, value, causal, key_padding_mask)
    if query is key and key is value:
        heads.keeps_torch(query)
        context = heads.attend(query, causal, key_padding_mask)
    else:
        require(not causal, "a causal mask over another sequence")
        context = heads.attend_memory(query, key, value, key_padding_mask)
    return project(context, heads.out), None


def _causal(mask: Tensor | None, is_causal: bool, name: str) -> bool:
    """Whether a mask is causal, which torch's flag promises; raises `Left` for any other mask."""
    require(mask is None or is_causal, "{} is given", name)
    require(mask is not None or not is_causal, "is_causal is given without {}", name)
    return is_causal


class _Layer:
    """What is read of an encoder or decoder layer."""

    def __init__(self, layer: Any, attentions: tuple[str, ...]) -> None:
        steps = len(attentions) + 1
        self.attentions = [
            read.within(layer, name, "torch.MultiheadAttention", _Heads) for name in attentions
        ]
        self.norms = [read.norm(layer, f"norm{number + 1}") for number in range(steps)]
        self.drops = [read.dropout(layer, f"dropout{number + 1}") for number in range(steps)]
        self.mlp = Mlp(
            read.linear(layer, "linear1", bias=True),
            read.activation(layer, "activation"),
            read.dropout(layer, "dropout"),
            read.linear(layer, "linear2"),
            self.drops[-1],
        )
        self.norm_first = bool(layer.norm_first)
        layouts = {each.batch_first for each in self.attentions}
        require(len(layouts) == 1, "its attentions differ in batch_first")

    def check(self, *inputs: Tensor) -> None:
        """Check the inputs against all weights."""
        norms = [tensor for norm in self.norms for tensor in norm[:2]]
        held = [tensor for each in self.attentions for tensor in each.weights]
        read.rows(self.mlp.first.weight.shape[1], *inputs, weights=(*norms, *held, *self.mlp.weights))


def _read_encoder_layer(layer: Any) -> _Layer:
    return _Layer(layer, ("self_attn",))


def _encoder_layer(
    self: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    layer, causal = _read_encoder_layer(self), _causal(src_mask, is_causal, "src_mask")
    layer.check(src)
    (heads,) = layer.attentions
    heads.check(src, src, src, causal, src_key_padding_mask)
    heads.keeps_torch(src)
    device = src.device.type
    other = not self.training and device != "cuda" and torch.is_autocast_enabled(device)
    require(not other, "autocast on {} in evaluation", device)  # torch's result has another dtype there

    def attention(x: Tensor) -> Branch:
        return heads.branch(heads.attend(x, causal, src_key_padding_mask), layer.drops[0])

    return _run(layer, src, [attention, _mlp_of(layer)])


def _read_decoder_layer(layer: Any) -> _Layer:
    return _Layer(layer, ("self_attn", "multihead_attn"))


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
    own.check(tgt, tgt, tgt, causal, tgt_key_padding_mask)
    cross.check(tgt, memory, memory, padding=memory_key_padding_mask)

    def attention(x: Tensor) -> Branch:
        return own.branch(own.attend(x, causal, tgt_key_padding_mask), layer.drops[0])

    def attention_over_memory(x: Tensor) -> Branch:
        return cross.branch(cross.attend_memory(x, memory, memory, memory_key_padding_mask), layer.drops[1])

    return _run(layer, tgt, [attention, attention_over_memory, _mlp_of(layer)])


def _read_released(layer: Any) -> _Layer:
    require(not layer.norm_first, "norm_first is set, and does nothing in it")
    return _read_decoder_layer(layer)


def _released_decoder_layer(self: Any, *inputs: Tensor | None, **masks: Tensor | None) -> Tensor:
    require(not self.norm_first, "norm_first is set, and does nothing in it")
    return _decoder_layer(self, *inputs, **masks)  # type: ignore[arg-type]


def _mlp_of(layer: _Layer) -> Any:
    return lambda x: Branch(feed_forward(x, layer.mlp), layer.mlp.second.bias, layer.mlp.drop)


def _run(layer: _Layer, x: Tensor, branches: list[Any]) -> Tensor:
    """Each branch is made without its bias, which the op that adds it to the residual stream takes."""
    if not layer.norm_first:
        for branch_of, norm in zip(branches, layer.norms, strict=True):
            x = add_post_norm(branch_of(x), x, norm)
        return x
    dtype = compute_dtype(layer.mlp.first.weight)
    branch = Branch(None, None, 0.0)  # type: ignore[arg-type]
    for branch_of, norm in zip(branches, layer.norms, strict=True):
        rows, x = fused_add_norm(x, branch.product, branch.bias, norm, dtype, p=branch.p)
        branch = branch_of(rows)
    return add_branch(x, branch)


_STEPS = "_sa_block", "_mha_block", "_ff_block"
_RELEASED_STEPS = "_selfatt", "_crossatt", "_ffn"
FORMS = {
    "torch.LayerNorm": Form(read.norm_of, _layer_norm),
    "torch.MultiheadAttention": Form(_Heads, _multihead_attention),
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
