"""Self-attention of two segments: the student's visible patches beside all of the guidance.

"one launch" and "two launches" are the forward pass with and without a kernel for both segments, whatever
`kernels/attention_pair.py` would choose: what its PAIRED_PROGRAMS has to be held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.harness import Operation, measure, seconds_a_call
from benchmarks.shapes import BASE, SMALL, TOKENS
from lmim_fast.kernels import attention_pair
from lmim_fast.ops.attention import self_attention

VARIANTS = ("ours", "one launch", "two launches", "eager", "compiled")
SHORTER = (25, 52)  # of an image of a fifth of the patches: here the backward pass has one launch too
pytestmark = pytest.mark.benchmark(timer=seconds_a_call)


def test_attention_pair(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    measure(benchmark, operation, direction, variant)


def operations(batch: int) -> Iterator[Operation]:
    for model in (SMALL, BASE):
        yield _pair(model.name, batch, TOKENS, model.width, model.heads)
    yield _pair(SMALL.name, batch, SHORTER, SMALL.width, SMALL.heads)


def _pair(model: str, batch: int, tokens: tuple[int, ...], width: int, heads: int) -> Operation:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        qkv = torch.randn(batch * sum(tokens), 3 * width, device=device, dtype=dtype)
        return qkv.requires_grad_(), torch.randn(3 * width, device=device).requires_grad_()

    def ours(qkv: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
        return self_attention(qkv, bias, heads, [(batch, count) for count in tokens], seed=seed)

    def forced(most: int, qkv: Tensor, bias: Tensor, seed: Tensor | None = None) -> Tensor:
        with mock.patch.object(attention_pair, "PAIRED_PROGRAMS", most):
            return ours(qkv, bias, seed)

    def plain(qkv: Tensor, bias: Tensor) -> Tensor:
        found = []
        for part, count in zip(
            (qkv + bias.to(qkv.dtype)).split([batch * n for n in tokens]), tokens, strict=True
        ):
            q, k, v = part.view(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
            found.append((weights @ v).transpose(1, 2).reshape(batch * count, width))
        return torch.cat(found)

    def passes(itemsize: int, training: bool) -> floors.Passes:
        both = [floors.attention(batch, count, count, width, heads, itemsize) for count in tokens]
        forward, backward = zip(*((one.forward, one.backward) for one in both), strict=True)
        return floors.Passes(sum(forward, ()), sum(backward, ()))

    forms: dict[str, Callable[..., Tensor]]
    forms = {"ours": ours, "one launch": partial(forced, 2**31), "two launches": partial(forced, 0)}
    sizes = dict(
        model=model, batch=batch, tokens=max(tokens), beside=min(tokens), width=width, heads=heads, p=0.0
    )
    return Operation("self_attention_pair", sizes, inputs, plain, forms, passes)
