"""Decoder tokens; rows of a table behind the shown ones, as wide as the decoder's projections of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.harness import Operation, measure, seconds_a_call
from benchmarks.shapes import DECODER, MASKED, TOKENS
from lmim_fast.ops.masking import select_patches
from lmim_fast.ops.tokens import append_table_rows, decoder_tokens

VARIANTS = ("ours", "eager", "compiled")
SHOWN, ALL = TOKENS
pytestmark = pytest.mark.benchmark(timer=seconds_a_call)


def test_tokens(benchmark: Any, operation: Operation, direction: str, variant: str) -> None:
    measure(benchmark, operation, direction, variant)


def operations(batch: int) -> Iterator[Operation]:
    yield _tokens(batch, DECODER.width)
    for count in (1, 2, 3):  # a query; keys and values; all three
        yield _append(batch, count * DECODER.width)


def _tokens(batch: int, width: int) -> Operation:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        visible = torch.randn(batch, SHOWN, width, device=device, dtype=dtype)
        bias, mask_token = torch.randn(width, device=device), torch.randn(1, 1, width, device=device)
        leaves = (tensor.requires_grad_() for tensor in (visible, bias, mask_token))
        return *leaves, torch.randn(1, ALL, width, device=device), *_ids(batch, device)

    def ours(
        visible: Tensor,
        bias: Tensor,
        mask_token: Tensor,
        position: Tensor,
        ids_visible: Tensor,
        ids_masked: Tensor,
        seed: Tensor | None = None,
    ) -> Tensor:
        return decoder_tokens(
            visible, bias, mask_token, position, ids_visible, ids_masked, dtype=visible.dtype
        )

    def plain(
        visible: Tensor,
        bias: Tensor,
        mask_token: Tensor,
        position: Tensor,
        ids_visible: Tensor,
        ids_masked: Tensor,
    ) -> Tensor:
        cls = position[:, :1].expand(batch, -1, -1)
        place = torch.cat([cls, position[0, 1:][ids_visible.long()]], dim=1)
        masked = mask_token + position[0, 1:][ids_masked.long()]
        return torch.cat([visible + (place + bias), masked], dim=1).to(visible.dtype)

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.decoder_tokens(batch, SHOWN, MASKED, width, itemsize)

    sizes = dict(model=DECODER.name, batch=batch, tokens=ALL, width=width, p=0.0)
    return Operation("decoder_tokens", sizes, inputs, plain, {"ours": ours}, passes, leading=True)


def _append(batch: int, width: int) -> Operation:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shown = torch.randn(batch, SHOWN, width, device=device, dtype=dtype)
        table = torch.randn(ALL - 1, width, device=device, dtype=dtype)
        return shown.requires_grad_(), table.requires_grad_(), _ids(batch, device)[1]

    def ours(shown: Tensor, table: Tensor, ids: Tensor, seed: Tensor | None = None) -> Tensor:
        return append_table_rows(shown, table, ids)

    def plain(shown: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        return torch.cat([shown, table[ids.long()]], dim=1)

    def passes(itemsize: int, training: bool) -> floors.Passes:
        return floors.append_table_rows(batch, SHOWN, MASKED, width, itemsize)

    sizes = dict(model=DECODER.name, batch=batch, tokens=ALL, columns=width, p=0.0)
    return Operation("append_table_rows", sizes, inputs, plain, {"ours": ours}, passes)


def _ids(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return select_patches(torch.rand(batch, ALL - 1, device=device), SHOWN - 1)
