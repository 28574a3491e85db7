"""Fast forms of torch.nn's TransformerEncoderLayer and TransformerDecoderLayer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmim_fast.layers.accelerated.base import Accelerated, Form, call_original, dropout_of, given, refusal
from lmim_fast.layers.accelerated.torch_layers import (
    attend_cross,
    attend_self,
    inherits,
    norm_dtype,
    unlike_attention,
    unlike_dropout,
    unlike_layer_norm,
    unlike_linear,
    unpaired,
)
from lmim_fast.layers.norm import add_norm
from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.mlp import mlp
from lmim_fast.ops.norm import dropout_add_layer_norm

Step = tuple[Callable[[Any, Tensor], tuple[Tensor, Tensor | None]], str]  # branch and bias, its dropout


class _FastTransformerLayer(Accelerated):
    """What encoder and decoder layers share."""

    self_attn: nn.MultiheadAttention
    linear1: nn.Linear
    linear2: nn.Linear
    norm_first: bool
    activation: Callable[[Tensor], Tensor]


class FastTransformerEncoderLayer(_FastTransformerLayer):
    """nn.TransformerEncoderLayer without masks."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerEncoderLayer.forward."""
        options = dict(src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        reason = (
            given(**options) or refusal(self, self.self_attn.embed_dim, src) or _unlike_autocast(self, src)
        )
        if reason:
            return call_original(self, reason, src, **options)
        steps: list[Step] = [(_attend_self, "dropout1"), (_feed_forward, "dropout2")]
        return _run(self, src, steps)


class FastTransformerDecoderLayer(_FastTransformerLayer):
    """nn.TransformerDecoderLayer without masks."""

    multihead_attn: nn.MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As nn.TransformerDecoderLayer.forward."""
        options = dict(
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        reason = (
            given(**options)
            or refusal(self, self.self_attn.embed_dim, tgt, memory)
            or unpaired(tgt, memory, memory, self.self_attn.batch_first)
        )
        if reason:
            return call_original(self, reason, tgt, memory, **options)

        def attend_memory(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
            attention = self.multihead_attn
            p = dropout_of(attention, "dropout")
            context = attend_cross(
                x,
                memory,
                memory,
                attention.in_proj_weight,
                attention.in_proj_bias,
                attention.num_heads,
                p,
                attention.batch_first,
            )
            return linear(context, attention.out_proj.weight), attention.out_proj.bias

        steps: list[Step] = [
            (_attend_self, "dropout1"),
            (attend_memory, "dropout2"),
            (_feed_forward, "dropout3"),
        ]
        return _run(self, tgt, steps)


def _run(layer: Any, x: Tensor, steps: list[Step]) -> Tensor:
    """Each step's branch is made without its bias, which the op that adds it to the residual stream takes."""
    norms = [getattr(layer, f"norm{number + 1}") for number in range(len(steps))]
    branch: Any
    if not layer.norm_first:
        for (branch_of, dropout), norm in zip(steps, norms, strict=True):
            branch, bias = branch_of(layer, x)
            x = add_post_norm(branch, bias, x, norm, dropout_of(layer, dropout))
        return x
    dtype = compute_dtype(layer.linear1.weight)
    branch, bias, p = None, None, 0.0
    for (branch_of, dropout), norm in zip(steps, norms, strict=True):
        normalised, x = add_norm(x, branch, bias, norm, dtype, p=p)
        branch, bias = branch_of(layer, normalised)
        p = dropout_of(layer, dropout)
    return add_branch(x, branch, bias, p)


def add_post_norm(
    branch: Tensor, bias: Tensor | None, residual: Tensor, norm: nn.LayerNorm, p: float
) -> Tensor:
    """Norm of residual + dropout(branch + bias), in the dtype that torch gives."""
    branch = branch.to(norm_dtype(residual))
    return dropout_add_layer_norm(branch, bias, residual, norm.weight, norm.bias, p=p, eps=norm.eps)[0]


def add_branch(residual: Tensor, branch: Tensor, bias: Tensor | None, p: float) -> Tensor:
    """residual + dropout(branch + bias) in residual's dtype."""
    if bias is not None:
        branch = branch + bias.to(branch.dtype)
    return residual + F.dropout(branch, p).to(residual.dtype)


def _attend_self(layer: _FastTransformerLayer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    attention = layer.self_attn
    p = dropout_of(attention, "dropout")
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    context = attend_self(x, weight, bias, attention.num_heads, p, attention.batch_first)
    return linear(context, attention.out_proj.weight), attention.out_proj.bias


def _feed_forward(layer: _FastTransformerLayer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    p = dropout_of(layer, "dropout")
    if _is_gelu(layer.activation):
        x = x.to(compute_dtype(layer.linear1.weight))
        weights = layer.linear1.weight, layer.linear1.bias, layer.linear2.weight
        return mlp(x, *weights, p=p), layer.linear2.bias
    hidden = F.dropout(layer.activation(F.linear(x, layer.linear1.weight, layer.linear1.bias)), p)
    return linear(hidden, layer.linear2.weight), layer.linear2.bias


def _unlike_autocast(module: nn.Module, x: Tensor) -> str | None:
    """A reason where torch's inference path gives another dtype than training does: autocast off CUDA."""
    if module.training or x.device.type == "cuda" or not torch.is_autocast_enabled(x.device.type):
        return None
    return f"autocast on {x.device.type} in eval mode"


def _is_gelu(activation: object) -> bool:
    return activation is F.gelu or (type(activation) is nn.GELU and activation.approximate == "none")


def _is_relu(activation: object) -> bool:
    return activation in (F.relu, torch.relu) or type(activation) is nn.ReLU


def _unlike(module: Any) -> str | None:
    """A reason where a torch encoder or decoder layer is not made of exactly torch's parts."""
    if not (_is_gelu(module.activation) or _is_relu(module.activation)):
        name = getattr(module.activation, "__name__", module.activation)
        return f"activation is {name}, not relu or exact GELU"
    for name, child in module.named_children():
        reason = None
        if name.startswith("norm"):
            reason = unlike_layer_norm(child) or inherits(nn.LayerNorm, "forward")(child)
        elif name in ("self_attn", "multihead_attn"):
            reason = unlike_attention(child)
        elif name.startswith("linear"):
            reason = unlike_linear(name, child, bias=True)
        elif name.startswith("dropout"):
            reason = unlike_dropout(name, child)
        elif name != "activation":
            reason = "is unknown"
        if reason:
            return reason if reason.startswith(name) else f"{name} {reason}"
    return None


def _unlike_encoder_layer(module: nn.TransformerEncoderLayer) -> str | None:
    methods = ("forward", "_sa_block", "_ff_block")
    return inherits(nn.TransformerEncoderLayer, *methods)(module) or _unlike(module)


def _unlike_decoder_layer(module: nn.TransformerDecoderLayer) -> str | None:
    methods = ("forward", "_sa_block", "_mha_block", "_ff_block")
    reason = inherits(nn.TransformerDecoderLayer, *methods)(module) or _unlike(module)
    if reason is None and module.self_attn.batch_first != module.multihead_attn.batch_first:
        return "its attentions differ in batch_first"
    return reason


ENCODER_LAYER = Form(
    "TransformerEncoderLayer",
    FastTransformerEncoderLayer,
    lambda module: isinstance(module, nn.TransformerEncoderLayer),
    _unlike_encoder_layer,
)
DECODER_LAYER = Form(
    "TransformerDecoderLayer",
    FastTransformerDecoderLayer,
    lambda module: isinstance(module, nn.TransformerDecoderLayer),
    _unlike_decoder_layer,
)
