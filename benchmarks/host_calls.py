"""Eager calls of the drop-in layers on small inputs on a CPU, against PyTorch's own modules.

No kernel runs: what differs is what our layers do around the same arithmetic. "forward" is a call in eval
mode without gradients, where PyTorch's attention has a fast path; "both" is forward and backward in training.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.turns import cpu_microseconds, in_turn
from lmim_fast import layers

SHAPE = (1, 8, 64)
HEADS = 2
DIRECTIONS = ("forward", "both")
_WIDTH = SHAPE[-1]
_HIDDEN = 4 * _WIDTH


class PlainBlock(nn.Module):
    """A pre-norm ViT block of PyTorch's modules."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.proj(context)
        out: Tensor = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return out


class Pair(NamedTuple):
    """A layer of ours, PyTorch's, and how both are called."""

    ours: nn.Module
    plain: nn.Module
    call: Callable[[Any, Tensor], Tensor]


def pairs() -> dict[str, Pair]:
    """The layers by name, newly made."""
    decoder = nn.TransformerDecoderLayer(
        _WIDTH, HEADS, _HIDDEN, dropout=0.0, activation="gelu", batch_first=True, layer_norm_eps=1e-6
    )
    return {
        "MultiheadAttention": Pair(
            layers.MultiheadAttention(_WIDTH, HEADS, batch_first=True),
            nn.MultiheadAttention(_WIDTH, HEADS, batch_first=True),
            lambda layer, x: layer(x, x, x, need_weights=False)[0],
        ),
        "Block": Pair(
            layers.Block(_WIDTH, HEADS, qkv_bias=True),
            PlainBlock(_WIDTH, HEADS),
            lambda layer, x: layer(x),
        ),
        "DecoderLayer": Pair(
            layers.DecoderLayer(_WIDTH, HEADS, _HIDDEN, dropout=0.0), decoder, lambda layer, x: layer(x, x)
        ),
    }


def measure(rounds: int, calls: int) -> list[dict[str, Any]]:
    """A row a layer and direction: microseconds a call in each round, forms taking turns, and the difference.

    Args:
        rounds: in each, both forms are called `calls` times.
        calls:  of a form in a round.
    """
    rows = []
    for name, pair in pairs().items():
        for direction in DIRECTIONS:
            runs = {
                form: functools.partial(cpu_microseconds, _runner(layer, pair.call, direction), calls)
                for form, layer in (("ours", pair.ours), ("plain", pair.plain))
            }
            times = in_turn(runs, rounds)
            difference = statistics.median(
                ours - plain for ours, plain in zip(times["ours"], times["plain"], strict=True)
            )
            rows.append(dict(layer=name, direction=direction, microseconds=times, difference=difference))
    return rows


def _runner(layer: nn.Module, call: Callable[[Any, Tensor], Tensor], direction: str) -> Callable[[], None]:
    x, gradient = torch.randn(SHAPE), torch.randn(SHAPE)

    def forward() -> None:
        with torch.no_grad():
            call(layer, x)

    def both() -> None:
        call(layer, x).backward(gradient)

    layer.train(direction == "both")
    x.requires_grad_(direction == "both")
    return both if direction == "both" else forward
