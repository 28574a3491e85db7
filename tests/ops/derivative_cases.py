"""Small inputs of every op that has a gradient, and of the drop-in layers, as functions of fp64 leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmim_fast.layers import Attention, Block, DecoderLayer, DropoutAddLayerNorm, Mlp, MultiheadAttention
from lmim_fast.ops.align import split_aligned
from lmim_fast.ops.attention import cross_attention, self_attention
from lmim_fast.ops.feature_loss import masked_feature_loss, masked_pixel_loss
from lmim_fast.ops.gelu import bias_gelu
from lmim_fast.ops.linear import linear_recomputing, shared_input_linears
from lmim_fast.ops.mlp import gelu_linear, mlp
from lmim_fast.ops.norm import dropout_add_layer_norm, layer_norm
from lmim_fast.ops.patch_embed import patch_embed
from lmim_fast.ops.tokens import append_table_rows, decoder_tokens

D, HEADS = 4, 2
IDS, OTHER_IDS = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1, 3], [0, 2]])
IMAGES, FEATURES = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 5, D, dtype=torch.float64)
LENGTHS = torch.tensor([2, 3])


class Case(NamedTuple):
    """A function of tensors, and their shapes."""

    form: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]

    def leaves(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in self.shapes)


def dropped_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return bias_gelu(x, bias, p=0.25, seed=torch.tensor([5]))


OPS = {
    "shared_input_linears": Case(
        lambda x, *weights: tuple(shared_input_linears(x, weights)), ((3, D), (5, D), (2, D))
    ),
    "linear_recomputing": Case(
        lambda x, bias, weight: linear_recomputing(bias_gelu(x, bias), weight, bias_gelu, x, bias),
        ((3, D), (D,), (5, D)),
    ),
    "bias_gelu": Case(bias_gelu, ((2, 3, D), (D,))),
    "bias_gelu with dropout": Case(dropped_gelu, ((2, 3, D), (D,))),
    "gelu_linear": Case(lambda x, *rest: gelu_linear(x * 1, *rest), ((2, 3, D), (D,), (5, D))),
    "mlp": Case(mlp, ((3, D), (6, D), (6,), (D, 6))),
    "split_aligned": Case(lambda x: split_aligned(x * 1, 2, 1, 2), ((6, D),)),
    "self_attention": Case(
        lambda qkv, bias: self_attention(qkv, bias, HEADS, [(2, 2), (1, 1)]), ((5, 3 * D), (3 * D,))
    ),
    "cross_attention": Case(
        lambda q, q_bias, kv, kv_bias: cross_attention(q, q_bias, kv, kv_bias, HEADS, key_lengths=LENGTHS),
        ((2, 2, D), (D,), (2, 3, 2 * D), (2 * D,)),
    ),
    "dropout_add_layer_norm": Case(dropout_add_layer_norm, ((2, D), (D,), (2, D), (D,), (D,))),
    "layer_norm": Case(lambda x, *rest: layer_norm(x, *rest, x.dtype), ((2, D), (D,), (D,))),
    "decoder_tokens": Case(
        lambda *inputs: decoder_tokens(*inputs, IDS, OTHER_IDS), ((2, 3, D), (D,), (1, 1, D), (1, 5, D))
    ),
    "append_table_rows": Case(lambda shown, table: append_table_rows(shown, table, IDS), ((2, 1, D), (4, D))),
    "patch_embed": Case(
        lambda images, *inputs: patch_embed(images, *inputs, IDS),
        ((2, 3, 4, 4), (D, 3, 2, 2), (D,), (1, 5, D), (1, 1, D)),
    ),
    "masked_feature_loss": Case(
        lambda product, bias: masked_feature_loss(product, bias, FEATURES.to(product.dtype), IDS),
        ((2, 2, D), (D,)),
    ),
    "masked_pixel_loss": Case(
        lambda product, bias: masked_pixel_loss(
            product, bias, IMAGES.to(product.dtype), IDS, 2, normalise=True
        ),
        ((2, 2, 12), (12,)),
    ),
}


def layer_case(module: nn.Module, *inputs: tuple[int, ...]) -> Case:
    """A layer as a function of its inputs and parameters; a result None is left out."""
    names = [name for name, _ in module.named_parameters()]

    def form(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        parameters = dict(zip(names, tensors[len(inputs) :], strict=True))
        result = torch.func.functional_call(module, parameters, tensors[: len(inputs)])
        return tuple(part for part in result if part is not None) if isinstance(result, tuple) else result

    return Case(form, (*inputs, *(tuple(parameter.shape) for parameter in module.parameters())))


def layers(batch: int, tokens: int) -> dict[str, Case]:
    """The drop-in layers for (batch, tokens, D)."""
    x, memory = (batch, tokens, D), (batch, tokens + 1, D)
    return {
        "Attention": layer_case(Attention(D, HEADS, qkv_bias=True), x),
        "MultiheadAttention": layer_case(MultiheadAttention(D, HEADS, batch_first=True), x, memory, memory),
        "Mlp": layer_case(Mlp(D, 6), x),
        "Block": layer_case(Block(D, HEADS, 2.0, qkv_bias=True), x),
        "DecoderLayer": layer_case(DecoderLayer(D, HEADS, 6, 0.0), x, memory),
        "DropoutAddLayerNorm": layer_case(DropoutAddLayerNorm(D), x, x),
    }


CASES = {**OPS, **layers(2, 2)}
