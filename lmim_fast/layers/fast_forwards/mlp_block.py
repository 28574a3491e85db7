"""torchvision's MLPBlock: linear, GELU, dropout, linear, dropout in one Sequential."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmim_fast.layers.fast_forwards import read
from lmim_fast.layers.fast_forwards.form import Form
from lmim_fast.layers.fast_forwards.read import require
from lmim_fast.layers.fast_forwards.sublayers import Branch, Mlp, feed_forward, finish


def _read(module: Any) -> Mlp:
    require(list(module._modules) == ["0", "1", "2", "3", "4"], "has {} parts", len(module._modules))
    first, second = read.linear(module, "0", bias=True), read.linear(module, "3")
    return Mlp(
        first, read.activation(module, "1"), read.dropout(module, "2"), second, read.dropout(module, "4")
    )


def _mlp_block(self: Any, input: Tensor, /, *more: object, **named: object) -> Tensor:
    read.unset(*more, **named)
    layer = _read(self)
    read.rows(layer.first.weight.shape[1], input, weights=layer.weights, dims=None)
    return finish(Branch(feed_forward(input, layer), layer.second.bias, layer.drop))


FORMS = {"torchvision.MLPBlock": Form(_read, _mlp_block)}
CLASSES = {"torchvision.models.vision_transformer.MLPBlock": "torchvision.MLPBlock"}
