"""Fast forms of torch.nn's LayerNorm and MultiheadAttention."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lmim_fast.layers.accelerated.base import (
    Accelerated,
    Form,
    bind,
    call_original,
    dropout_of,
    example,
    given,
    refusal,
)
from lmim_fast.layers.accelerated.record import original_class
from lmim_fast.ops.attention import cross_attention, self_attention
from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.norm import layer_norm

LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


class FastLayerNorm(Accelerated):
    """nn.LayerNorm over the last dimension, with weight and bias."""

    normalized_shape: tuple[int, ...]
    weight: nn.Parameter
    bias: nn.Parameter
    eps: float

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """(..., D) to (..., D)."""
        inputs, reason = bind(self, 1, arguments, named)
        reason = reason or refusal(self, self.normalized_shape[0], *inputs, batched=False)
        if reason:
            return call_original(self, reason, *arguments, **named)
        (x,) = inputs
        return layer_norm(x, self.weight, self.bias, norm_dtype(x), eps=self.eps)


class FastMultiheadAttention(Accelerated):
    """nn.MultiheadAttention without masks and without weights to give back."""

    embed_dim: int
    num_heads: int
    batch_first: bool
    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None
    out_proj: nn.Linear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward."""
        options = dict(
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            is_causal=is_causal,
        )
        reason = (
            given(**options)
            or refusal(self, self.embed_dim, query, key, value)
            or unpaired(query, key, value, self.batch_first)
        )
        if reason:
            options["average_attn_weights"] = average_attn_weights
            return call_original(self, reason, query, key, value, **options)
        p = dropout_of(self, "dropout")
        if query is key and key is value:
            context = attend_self(
                query, self.in_proj_weight, self.in_proj_bias, self.num_heads, p, self.batch_first
            )
        else:
            context = attend_cross(
                query, key, value, self.in_proj_weight, self.in_proj_bias, self.num_heads, p, self.batch_first
            )
        return self.out_proj(context), None


def attend_self(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, p: float, batch_first: bool = True
) -> Tensor:
    """Context (B, N, D), or (N, B, D) for such x, of self-attention with the packed projection `weight`."""
    x = _batch_first(x, batch_first).to(compute_dtype(weight))
    qkv = linear(x, weight).flatten(0, 1)
    context = self_attention(qkv, bias, heads, [(x.shape[0], x.shape[1])], p=p)
    return _batch_first(context.view(*x.shape[:2], -1), batch_first)


def attend_cross(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    p: float,
    batch_first: bool = True,
) -> Tensor:
    """Context, in the layout of `query`, of attention over keys and values."""
    dtype, width = compute_dtype(weight), weight.shape[1]
    q = linear(_batch_first(query, batch_first).to(dtype), weight[:width])
    k = _batch_first(key, batch_first).to(dtype)
    if key is value:
        kv = linear(k, weight[width:])
    else:
        v = _batch_first(value, batch_first).to(dtype)
        kv = torch.cat([linear(k, weight[width : 2 * width]), linear(v, weight[2 * width :])], -1)
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    return _batch_first(cross_attention(q, q_bias, kv, kv_bias, heads, p=p), batch_first)


def _batch_first(x: Tensor, batch_first: bool) -> Tensor:
    return x if batch_first else x.transpose(0, 1)


def norm_dtype(x: Tensor) -> torch.dtype:
    """Dtype of torch's LayerNorm of x: CUDA's autocast runs it in fp32, that of other devices leaves it."""
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return x.dtype


def unpaired(query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> str | None:
    """A reason where queries, keys and values are not of one batch, or keys and values not pairs."""
    batch = 0 if batch_first else 1
    if key.shape != value.shape or query.shape[batch] != key.shape[batch]:
        return f"inputs of shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    return None


def inherits(base: type[nn.Module], *methods: str) -> Any:
    """A rule: the module is a `base` whose `methods` are those of base."""

    def check(module: nn.Module) -> str | None:
        cls = original_class(module)
        for name in methods:
            same = inspect.getattr_static(cls, name) is inspect.getattr_static(base, name)
            if not same or name in vars(module):
                return f"{cls.__name__} has a {name} of its own"
        return None

    return check


def unlike_layer_norm(module: nn.Module) -> str | None:
    """A reason where a module is no nn.LayerNorm with weight and bias over the last dimension."""
    if not isinstance(module, nn.LayerNorm):
        return f"is a {type(module).__name__}"
    if len(module.normalized_shape) != 1:
        return f"normalises over {len(module.normalized_shape)} dimensions"
    if module.weight is None or module.bias is None:
        return "has no weight or no bias"
    for name in (*module._parameters, *module._buffers, *module._modules):
        if name not in ("weight", "bias"):
            return f"has {name} of its own"
    return None


def unlike_linear(name: str, layer: object, bias: bool = False) -> str | None:
    """A reason where a child is not exactly torch's linear, or lacks the bias that it must have."""
    if not isinstance(layer, nn.Module) or original_class(layer) not in LINEAR:
        return f"{name} is a {type(layer).__name__}, not a Linear"
    return f"{name} has no bias" if bias and layer.bias is None else None


def unlike_dropout(name: str, child: object) -> str | None:
    """A reason where a child is neither an identity nor a dropout below 1."""
    if type(child) is nn.Identity:
        return None
    if type(child) is not nn.Dropout:
        return f"{name} is a {type(child).__name__}"
    return None if 0 <= child.p < 1 else f"{name} is {child.p}"


def unlike_attention(module: nn.Module) -> str | None:
    """A reason where a module is no nn.MultiheadAttention, or has options that the fast form lacks."""
    if not isinstance(module, nn.MultiheadAttention):
        return f"is a {type(module).__name__}"
    if not module._qkv_same_embed_dim:
        return "kdim or vdim differs from embed_dim"
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "add_bias_kv or add_zero_attn is set"
    if not 0 <= module.dropout < 1:
        return f"dropout is {module.dropout}"
    return inherits(nn.MultiheadAttention, "forward")(module) or unlike_linear("out_proj", module.out_proj)


def _layer_norm_examples(module: nn.LayerNorm) -> list[tuple[Tensor, ...]]:
    """Inputs to compare the forward of a subclass on; torch's own is known."""
    if inherits(nn.LayerNorm, "forward")(module) is None:
        return []
    width = module.normalized_shape[0]
    return [
        (example(2, 5, width),),
        (example(3, width),),
        (example(2, 3, 2, width),),
        (example(2, 5, width, size=1e3),),
    ]


LAYER_NORM = Form(
    "LayerNorm",
    FastLayerNorm,
    lambda module: isinstance(module, nn.LayerNorm),
    unlike_layer_norm,
    _layer_norm_examples,
)
MULTIHEAD_ATTENTION = Form(
    "MultiheadAttention",
    FastMultiheadAttention,
    lambda module: isinstance(module, nn.MultiheadAttention),
    unlike_attention,
)
