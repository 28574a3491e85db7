"""Fast forms of decoder layers whose forward takes (x, memory), as those of `lmim_fast.reference`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lmim_fast.layers.accelerated.base import (
    Accelerated,
    Form,
    bind,
    call_original,
    dropout_of,
    example,
    refusal,
)
from lmim_fast.layers.accelerated.torch_layers import (
    attend_cross,
    attend_self,
    unlike_dropout,
    unlike_layer_norm,
    unlike_linear,
    unpaired,
)
from lmim_fast.layers.accelerated.transformer import add_post_norm
from lmim_fast.layers.accelerated.vit import has
from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.mlp import mlp

ORDERS = ("sa_ca", "ca_sa")
PARTS = ("self_attn", "multihead_attn", "linear1", "linear2", "norm1", "norm2", "norm3", "dropout")


class FastGuidedAttention(Accelerated):
    """Attention of x over memory with torch's in_proj names."""

    heads: int
    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter
    out_proj: nn.Linear

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """x (B, N, D), memory (B, M, D) to (B, N, D)."""
        inputs, reason = bind(self, 2, arguments, named)
        reason = reason or _refusal(self, self.out_proj.in_features, *inputs)
        if reason:
            return call_original(self, reason, *arguments, **named)
        x, memory = inputs
        return self.out_proj(_attend(self, x, memory))


class FastGuidedDecoderLayer(Accelerated):
    """Post-norm self-attention, cross-attention (in the order given) and FFN with exact GELU."""

    order: str
    linear1: nn.Linear
    linear2: nn.Linear
    norm3: nn.LayerNorm

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """x (B, N, D), memory (B, M, D) to (B, N, D)."""
        inputs, reason = bind(self, 2, arguments, named)
        reason = reason or _refusal(self, self.linear1.in_features, *inputs)
        if reason:
            return call_original(self, reason, *arguments, **named)
        x, memory = inputs
        p = dropout_of(self, "dropout")
        for step in self.order.split("_"):
            attention: Any = self.self_attn if step == "sa" else self.multihead_attn
            norm: Any = self.norm1 if step == "sa" else self.norm2
            context = _attend(attention, x, x if step == "sa" else memory)
            product = linear(context, attention.out_proj.weight)
            x = add_post_norm(product, attention.out_proj.bias, x, norm, p)
        hidden = x.to(compute_dtype(self.linear1.weight))
        weights = self.linear1.weight, self.linear1.bias, self.linear2.weight
        product = mlp(hidden, *weights, p=p)
        return add_post_norm(product, self.linear2.bias, x, self.norm3, p)


def _refusal(layer: nn.Module, width: int, x: Tensor, memory: Tensor) -> str | None:
    return refusal(layer, width, x, memory) or unpaired(x, memory, memory, True)


def _attend(attention: Any, x: Tensor, memory: Tensor) -> Tensor:
    weight, bias, heads = attention.in_proj_weight, attention.in_proj_bias, attention.heads
    p = dropout_of(attention, "dropout")
    if x is memory:
        return attend_self(x, weight, bias, heads, p)
    return attend_cross(x, memory, memory, weight, bias, heads, p)


def _fits_attention(module: nn.Module) -> bool:
    weight, heads = module._parameters.get("in_proj_weight"), getattr(module, "heads", None)
    return has(module, "out_proj") and weight is not None and isinstance(heads, int)


def _unlike_attention(module: Any) -> str | None:
    for name in (*module._parameters, *module._modules, *module._buffers):
        if name not in ("in_proj_weight", "in_proj_bias", "out_proj"):
            return f"has {name} of its own"
    width = module.in_proj_weight.shape[-1]
    if module.in_proj_weight.shape != (3 * width, width) or module.heads < 1 or width % module.heads:
        return f"in_proj_weight is {tuple(module.in_proj_weight.shape)} for {module.heads} heads"
    p = getattr(module, "dropout", 0.0)
    if not isinstance(p, float | int) or not 0 <= p < 1:
        return f"dropout is {p}"
    return unlike_linear("out_proj", module.out_proj)


def _unlike_decoder_layer(module: Any) -> str | None:
    unknown = [
        name for name in (*module._parameters, *module._modules, *module._buffers) if name not in PARTS
    ]
    if unknown:
        return f"has {unknown[0]} of its own"
    if module.order not in ORDERS:
        return f"order is {module.order}"
    for name, child in module.named_children():
        if name.endswith("attn"):
            reason = _unlike_attention(child) if _fits_attention(child) else f"is a {type(child).__name__}"
        elif name.startswith("norm"):
            reason = unlike_layer_norm(child)
        elif name.startswith("linear"):
            reason = unlike_linear(name, child, bias=True)
        else:
            reason = unlike_dropout(name, child)
        if reason:
            return reason if reason.startswith(name) else f"{name} {reason}"
    return None


def _examples(width: int) -> list[tuple[Tensor, ...]]:
    return [
        (example(2, 7, width), example(2, 5, width)),
        (example(1, 320, width), example(1, 300, width)),
    ]


GUIDED_ATTENTION = Form(
    "guided attention",
    FastGuidedAttention,
    _fits_attention,
    _unlike_attention,
    lambda module: _examples(module.in_proj_weight.shape[1]),
)
GUIDED_DECODER_LAYER = Form(
    "guided decoder layer",
    FastGuidedDecoderLayer,
    lambda module: has(module, *PARTS[:-1]) and hasattr(module, "order"),
    _unlike_decoder_layer,
    lambda module: _examples(module.linear1.in_features),
)
