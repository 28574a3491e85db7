"""Layers of the transformers package: self-attention with separate projections, and the MLP around it.

ViT, ViTMAE, DeiT (TrOCR's encoders) and BERT in the structures of transformers 4 and 5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmim_fast.layers.fast_forwards import read
from lmim_fast.layers.fast_forwards.form import Form
from lmim_fast.layers.fast_forwards.read import Linear, Norm, check_heads, require
from lmim_fast.layers.fast_forwards.sublayers import (
    Attention,
    Block,
    Branch,
    Mlp,
    add_post_norm,
    sublayer_form,
)
from lmim_fast.ops.gelu import bias_gelu
from lmim_fast.ops.linear import compute_dtype, linear

# "eager" returns attention weights; others may be functions of the user's own.
_IMPLEMENTATIONS = "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"
_NAMES = ("query", "key", "value"), ("q_proj", "k_proj", "v_proj")


def _plain(self: Any, *options: object, output_hidden_states: object = None, **named: object) -> bool:
    """Not causal; hidden states are kept by the model around the layers, which are told of it."""
    read.unset(*options, **named)
    recompute = getattr(self, "gradient_checkpointing", False) and self.training
    require(not recompute, "gradient checkpointing in its forward")
    return False


def _with_no_weights(context: Tensor) -> tuple[Tensor, None]:
    return context, None


def _read_self_attention(module: Any) -> Attention:
    """Without the output projection, as transformers 4 and BERT have it."""
    names = _NAMES[0] if "query" in module._modules else _NAMES[1]
    read.holds_only(module, *names, "dropout", "o_proj")
    qkv = read.joined(*(read.linear(module, name) for name in names))
    heads = module.num_attention_heads
    check_heads(len(qkv.weight), heads, getattr(module, "scaling", None))
    causal = getattr(module, "is_causal", False) or getattr(module, "is_decoder", False)
    require(not causal, "it is causal")
    embedding = getattr(module, "position_embedding_type", None) or "absolute"
    require(embedding == "absolute", "position embedding {}", embedding)
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation is None:  # transformers 4's BERT has a class each
        implementation = "sdpa" if "Sdpa" in type(module).__name__ else "eager"
    require(implementation in _IMPLEMENTATIONS, "attn_implementation is {}", implementation)
    return Attention(qkv, heads, read.dropout(module, "dropout", "dropout_prob", "attention_dropout"))


def _read_attention(module: Any) -> Attention:
    require("q_proj" in module._modules, "its parts have fast forms, it has none (transformers 4)")
    return _read_self_attention(module)._replace(proj=read.linear(module, "o_proj"))


def _read_mlp(module: Any) -> Mlp:
    read.holds_only(module, "fc1", "activation_fn", "fc2")
    first, second = read.linear(module, "fc1", bias=True), read.linear(module, "fc2")
    return Mlp(first, read.activation(module, "activation_fn"), 0.0, second, 0.0)


def _read_layer(layer: Any) -> Block:
    """Transformers 5's pre-norm layer."""
    require("mlp" in layer._modules, "its parts have fast forms, it has none (transformers 4)")
    read.holds_only(layer, "attention", "mlp", "layernorm_before", "layernorm_after", "dropout")
    drop = read.dropout(layer, "dropout")
    attention = read.within(layer, "attention", "transformers.Attention", _read_attention)
    mlp = read.within(layer, "mlp", "transformers.Mlp", _read_mlp)
    norm1, norm2 = read.norm(layer, "layernorm_before"), read.norm(layer, "layernorm_after")
    return Block(norm1, attention._replace(drop=drop), None, norm2, mlp._replace(drop=drop), None)


def _read_intermediate(module: Any) -> Linear:
    read.holds_only(module, "dense", "intermediate_act_fn")
    require(read.activation(module, "intermediate_act_fn") is None, "its activation is not exact GELU")
    return read.linear(module, "dense", bias=True)


def _intermediate(self: Any, hidden_states: Tensor, /, *options: object, **named: object) -> Tensor:
    _plain(self, *options, **named)
    weight, bias = _read_intermediate(self)
    read.rows(weight.shape[1], hidden_states, weights=(weight, bias), dims=None)
    assert bias is not None
    return bias_gelu(linear(hidden_states.to(compute_dtype(weight)), weight), bias)


def _read_output(module: Any) -> tuple[Linear, Norm, float]:
    read.holds_only(module, "dense", "LayerNorm", "dropout")
    return read.linear(module, "dense"), read.norm(module, "LayerNorm"), read.dropout(module, "dropout")


def _output(
    self: Any, hidden_states: Tensor, input_tensor: Tensor, /, *options: object, **named: object
) -> Tensor:
    """LayerNorm(dropout(dense(hidden_states)) + input_tensor)."""
    _plain(self, *options, **named)
    dense, norm, p = _read_output(self)
    read.rows(dense.weight.shape[1], hidden_states, weights=(*dense, *norm[:2]), dims=None)
    read.rows(len(dense.weight), input_tensor, weights=(*dense, *norm[:2]), dims=None)
    require(hidden_states.shape[:-1] == input_tensor.shape[:-1], "inputs of two shapes")
    product = linear(hidden_states.to(compute_dtype(dense.weight)), dense.weight)
    return add_post_norm(Branch(product, dense.bias, p), input_tensor, norm)


FORMS = {
    "transformers.SelfAttention": sublayer_form(_read_self_attention, _plain, _with_no_weights),
    "transformers.Attention": sublayer_form(_read_attention, _plain, _with_no_weights),
    "transformers.Mlp": sublayer_form(_read_mlp, _plain),
    "transformers.Layer": sublayer_form(_read_layer, _plain),
    "transformers.Intermediate": Form(_read_intermediate, _intermediate),
    "transformers.Output": Form(_read_output, _output),
}
_VITS = {"vit": "ViT", "vit_mae": "ViTMAE", "deit": "DeiT"}
_STRUCTURES = {
    "SelfAttention": "SelfAttention",
    "SdpaSelfAttention": "SelfAttention",
    "Attention": "Attention",
    "MLP": "Mlp",
    "Layer": "Layer",
    "Intermediate": "Intermediate",
}
CLASSES = {
    f"transformers.models.{file}.modeling_{file}.{prefix}{name}": f"transformers.{form}"
    for file, prefix in _VITS.items()
    for name, form in _STRUCTURES.items()
} | {
    f"transformers.models.bert.modeling_bert.Bert{name}": f"transformers.{form}"
    for name, form in {
        "SelfAttention": "SelfAttention",
        "SdpaSelfAttention": "SelfAttention",
        "Intermediate": "Intermediate",
        "SelfOutput": "Output",
        "Output": "Output",
    }.items()
}
