"""Decoder input tokens and rows of a table, by their kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast import kernels
from lmim_fast.ops.operators.operator import cast, function, operator


def _tokens_fake(  # type: ignore[no-untyped-def]
    visible, bias, mask_token, position, ids_visible, ids_masked, dtype
):
    batch, shown, width = visible.shape
    return visible.new_empty((batch, shown + ids_masked.shape[1], width), dtype=dtype)


def _tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    visible, bias, mask_token = inputs[:3]
    ctx.shown, ctx.rows = visible.shape[1], inputs[3].shape[1]
    ctx.dtypes = visible.dtype, bias.dtype, mask_token.dtype


def _tokens_differentiate(
    ctx: Any, grad: Tensor | None, grad_shown: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    visible_wanted, bias_wanted, mask_token_wanted = ctx.needs_input_grad[:3]
    if grad is None:
        assert grad_shown is not None
        grad = F.pad(grad_shown, (0, 0, 0, ctx.rows - ctx.shown))
        grad_shown = None
    visible_dtype, bias_dtype, mask_token_dtype = ctx.dtypes
    wanted = visible_dtype if visible_wanted else None
    if grad_shown is None:
        grad_visible, sums = decoder_tokens_backward(grad, ctx.shown, wanted, mask_token_wanted)
    else:
        grad_visible, sums = kernels.tokens.decoder_tokens_backward(
            grad, ctx.shown, visible_dtype=wanted, mask_token=mask_token_wanted, grad_shown=grad_shown
        )
    return (
        grad_visible if visible_wanted else None,
        cast(sums[0], bias_dtype) if bias_wanted else None,
        cast(sums[1], mask_token_dtype).view(1, 1, -1) if mask_token_wanted else None,
        *(None,) * 4,
    )


@operator(_tokens_fake, _tokens_setup, _tokens_differentiate)
def decoder_tokens(
    visible: Tensor,
    bias: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_visible: Tensor,
    ids_masked: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """(B, 1 + L, D) in `dtype`."""
    tokens: Tensor = kernels.tokens.decoder_tokens(
        visible, bias, mask_token, position, ids_visible, ids_masked, dtype
    )
    return tokens


def _shared_tokens(*arguments: Any) -> tuple[Tensor, Tensor]:
    tokens = kernels.tokens.decoder_tokens(*arguments)
    return tokens, tokens[:, : arguments[0].shape[1]]


# Of plain calls alone: an operator must not return memory twice.
shared_decoder_tokens = function(
    "shared_decoder_tokens", _shared_tokens, _tokens_setup, _tokens_differentiate
).apply


def _tokens_backward_fake(grad, shown, visible_dtype, mask_token):  # type: ignore[no-untyped-def]
    batch, _, width = grad.shape
    size = 0 if visible_dtype is None else (batch, shown, width)
    sums = grad.new_empty((2, width), dtype=torch.float32)
    return grad.new_empty(size, dtype=visible_dtype or grad.dtype), sums


@operator(_tokens_backward_fake)
def decoder_tokens_backward(
    grad: Tensor, shown: int, visible_dtype: torch.dtype | None, mask_token: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of visible, empty where no dtype is given; (2, D) fp32 gradients of bias and mask_token."""
    grad_visible, sums = kernels.tokens.decoder_tokens_backward(
        grad, shown, visible_dtype=visible_dtype, mask_token=mask_token
    )
    return grad.new_empty(0) if grad_visible is None else grad_visible, sums


def _append_fake(shown, table, ids):  # type: ignore[no-untyped-def]
    rows = ids.shape[1] + (0 if shown is None else shown.shape[1])
    return table.new_empty((ids.shape[0], rows, table.shape[1]))


def _append_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, ids = inputs
    ctx.save_for_backward(ids)
    ctx.patches = table.shape[0]


def _append_differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    shown_wanted, table_wanted, _ = ctx.needs_input_grad
    (ids,) = ctx.saved_tensors
    grad_shown, grad_table = append_table_rows_backward(grad, ids, ctx.patches, shown_wanted, table_wanted)
    return grad_shown if shown_wanted else None, grad_table if table_wanted else None, None


@operator(_append_fake, _append_setup, _append_differentiate)
def append_table_rows(shown: Tensor | None, table: Tensor, ids: Tensor) -> Tensor:
    """(B, S + M, F)."""
    if shown is None:
        shown = table.new_empty((ids.shape[0], 0, table.shape[1]))
    rows: Tensor = kernels.table_rows.append_rows(shown, table, ids)
    return rows


def _append_backward_fake(grad, ids, patches, shown_wanted, table_wanted):  # type: ignore[no-untyped-def]
    batch, rows, width = grad.shape
    shown = grad.new_empty((batch, rows - ids.shape[1], width) if shown_wanted else 0)
    return shown, grad.new_empty((patches, width) if table_wanted else 0)


@operator(_append_backward_fake)
def append_table_rows_backward(
    grad: Tensor, ids: Tensor, patches: int, shown_wanted: bool, table_wanted: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the shown rows and of the table, empty where they are not wanted."""
    count = grad.shape[1] - ids.shape[1]
    grad_shown, grad_table = grad.new_empty(0), grad.new_empty(0)
    if shown_wanted:
        none = grad.new_empty(0, grad.shape[2])
        grad_shown = kernels.table_rows.append_rows(grad[:, :count], none, ids[:, :0])
    if table_wanted:
        sums = kernels.table_rows.table_gradient(grad[:, count:], ids, patches)
        grad_table = cast(sums, grad.dtype)
    return grad_shown, grad_table
