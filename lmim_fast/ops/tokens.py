"""Decoder input tokens, ordered cls, visible, masked: no scatter, since attention has no order."""

from __future__ import annotations

import torch
from torch import Tensor

from lmim_fast.ops import dispatch
from lmim_fast.ops.operators import tokens as operators
from lmim_fast.ops.operators.operator import differentiable, direct

_NO_VALUES = "takes rows of at least 1 value, got 0"


def decoder_tokens(
    visible: Tensor,
    bias: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_visible: Tensor,
    ids_masked: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Add bias and positions to the visible tokens and append the mask tokens.

    Args:
        visible:     (B, 1 + K, D) embedded latent without its bias, cls first.
        bias:        (D,) of the linear that made it; its gradient comes out of this op.
        mask_token:  (1, 1, D).
        position:    (1, 1 + L, D), row 0 for cls.
        ids_visible: (B, K) int64 patches of the visible rows, in [0, L).
        ids_masked:  (B, L - K) int64 patches of the others.
        dtype:       of the result; None for position's. The sums are rounded once where a kernel runs.
    Returns:
        (B, 1 + L, D): cls, the rows of ids_visible, those of ids_masked.
    Raises:
        ValueError: the ids and tokens do not fit each other, an input is of another type, or inputs are on
            several devices.
    """
    arguments = visible, bias, mask_token, position, ids_visible, ids_masked, dtype or position.dtype
    if _takes(*arguments):
        tokens: Tensor = operators.decoder_tokens(*arguments)
        return tokens
    return _tokens_eager(*arguments)


def shared_decoder_tokens(
    visible: Tensor,
    bias: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_visible: Tensor,
    ids_masked: Tensor,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`decoder_tokens`, and its first 1 + K rows once more for a reader of their own.

    The gradients of both are added in the backward pass that makes those of `visible`.
    """
    arguments = visible, bias, mask_token, position, ids_visible, ids_masked, dtype
    if direct(*arguments) and differentiable(*arguments) and _takes(*arguments):
        tokens, shown = operators.shared_decoder_tokens(*arguments)
        return tokens, shown
    tokens = decoder_tokens(*arguments[:-1], dtype=dtype)
    return tokens, tokens[:, : visible.shape[1]]


def _takes(
    visible: Tensor,
    bias: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_visible: Tensor,
    ids_masked: Tensor,
    dtype: torch.dtype,
) -> bool:
    """True if the kernel runs; raises the errors of `decoder_tokens`."""
    shapes = visible, ids_visible, ids_masked, position
    batch, shown = visible.shape[0], visible.shape[1] if visible.dim() == 3 else 0
    if (
        visible.dim() != 3
        or ids_visible.shape != (batch, shown - 1)
        or ids_masked.dim() != 2
        or ids_masked.shape[0] != batch
        or position.shape != (1, shown + ids_masked.shape[1], visible.shape[2])
    ):
        raise ValueError(
            "need visible (B, 1+K, D), ids_visible (B, K), ids_masked (B, M), position (1, 1+K+M, D); got "
            f"{[tuple(t.shape) for t in shapes]}"
        )
    width = visible.shape[2]
    if bias.shape != (width,) or mask_token.shape != (1, 1, width):
        raise ValueError(
            f"need bias ({width},) and mask_token (1, 1, {width}), got {tuple(bias.shape)} and "
            f"{tuple(mask_token.shape)}"
        )
    _check_types(
        dict(visible=visible, bias=bias, mask_token=mask_token, position=position),
        dict(ids_visible=ids_visible, ids_masked=ids_masked),
    )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, got {dtype}")
    return dispatch.takes("decoder_tokens", (visible, bias, mask_token, position), _refuses(position), dtype)


def append_table_rows(shown: Tensor | None, table: Tensor, ids: Tensor) -> Tensor:
    """The rows `shown` of each image, and behind them the table's rows at its `ids`.

    Args:
        shown: (B, S, F), or None for no rows.
        table: (L, F) in the same dtype; its gradient is summed in a fixed order.
        ids:   (B, M) int64, in [0, L), no number twice in an image.
    Returns:
        (B, S + M, F).
    Raises:
        ValueError: shapes or dtypes do not fit each other, or inputs are on several devices.
    """
    if table.dim() != 2 or ids.dim() != 2:
        raise ValueError(f"need table (L, F) and ids (B, M), got {tuple(table.shape)} and {tuple(ids.shape)}")
    _check_types(dict(table=table), dict(ids=ids))
    if shown is not None:
        if shown.dim() != 3 or (shown.shape[0], shown.shape[2]) != (ids.shape[0], table.shape[1]):
            raise ValueError(
                f"shown must be ({ids.shape[0]}, S, {table.shape[1]}) for ids {tuple(ids.shape)} and table "
                f"{tuple(table.shape)}, got {tuple(shown.shape)}"
            )
        if shown.dtype != table.dtype:
            raise ValueError(f"shown and table must have one dtype, got {shown.dtype} and {table.dtype}")
    if ids.shape[1] > table.shape[0]:
        raise ValueError(f"{ids.shape[1]} ids of an image cannot differ in a table of {table.shape[0]} rows")
    dispatch.same_device(shown=shown, table=table, ids=ids)
    reason = None if table.shape[1] else _NO_VALUES
    if dispatch.takes("append_table_rows", (table, shown), reason):
        rows: Tensor = operators.append_table_rows(shown, table, ids)
        return rows
    appended = gather_table(table, ids)
    return appended if shown is None else torch.cat([shown, appended], dim=1)


def mask_table(mask_token: Tensor, position: Tensor) -> Tensor:
    """Decoder input of every patch when it is masked, (L, D): the same for all images."""
    return mask_token[0].to(position.dtype) + position[0, 1:]


def gather_table(table: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (B, M), unique in an image, of a table (L, D), as (B, M, D).

    Not `table[ids]`, whose backward adds with atomics: its result changes from run to run.
    """
    expanded = table.expand(ids.shape[0], -1, -1)
    return expanded.gather(1, ids[:, :, None].expand(-1, -1, table.shape[1]))


def _check_types(values: dict[str, Tensor], ids: dict[str, Tensor]) -> None:
    """Raise ValueError unless `values` are floating-point, `ids` int64, and all on one device."""
    for name, tensor in values.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    for name, tensor in ids.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {tensor.dtype}")
    dispatch.same_device(**values, **ids)


def _tokens_eager(
    visible: Tensor,
    bias: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_visible: Tensor,
    ids_masked: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    full = position.dtype
    place = torch.cat(
        [position[:, :1].expand(len(visible), -1, -1), gather_table(position[0, 1:], ids_visible)], dim=1
    )
    shown = visible.to(full) + (place + bias.to(full))
    return torch.cat([shown, gather_table(mask_table(mask_token, position), ids_masked)], dim=1).to(dtype)


def _refuses(position: Tensor) -> str | None:
    if position.requires_grad and torch.is_grad_enabled():
        return "makes no gradient of position"
    return None if position.shape[2] else _NO_VALUES
