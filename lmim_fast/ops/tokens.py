"""Decoder input tokens, ordered cls, visible, masked: no scatter, since attention has no order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmim_fast.ops import dispatch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, got {dtype}")
    return dispatch.run(
        "decoder_tokens",
        _tokens_eager,
        visible,
        bias,
        mask_token,
        position,
        ids_visible,
        ids_masked,
        dtype or position.dtype,
    )


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
    return dispatch.run("append_table_rows", _append_eager, shown, table, ids)


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


def _append_eager(shown: Tensor | None, table: Tensor, ids: Tensor) -> Tensor:
    rows = gather_table(table, ids)
    return rows if shown is None else torch.cat([shown, rows], dim=1)


@torch.library.custom_op("lmim_fast::decoder_tokens", mutates_args=())
def _tokens(
    visible: Tensor,
    bias: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_visible: Tensor,
    ids_masked: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    from lmim_fast.kernels import tokens

    return tokens.decoder_tokens(visible, bias, mask_token, position, ids_visible, ids_masked, dtype)


@_tokens.register_fake
def _(visible, bias, mask_token, position, ids_visible, ids_masked, dtype):  # type: ignore[no-untyped-def]
    batch, shown, width = visible.shape
    return visible.new_empty((batch, shown + ids_masked.shape[1], width), dtype=dtype)


@torch.library.custom_op("lmim_fast::decoder_tokens_backward", mutates_args=())
def _tokens_backward(
    grad: Tensor, shown: int, visible_dtype: torch.dtype | None, mask_token: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of visible, empty where no dtype is given; (2, D) fp32 gradients of bias and mask_token."""
    from lmim_fast.kernels import tokens

    grad_visible, sums = tokens.decoder_tokens_backward(
        grad, shown, visible_dtype=visible_dtype, mask_token=mask_token
    )
    return grad.new_empty(0) if grad_visible is None else grad_visible, sums


@_tokens_backward.register_fake
def _(grad, shown, visible_dtype, mask_token):  # type: ignore[no-untyped-def]
    batch, _, width = grad.shape
    size = 0 if visible_dtype is None else (batch, shown, width)
    sums = grad.new_empty((2, width), dtype=torch.float32)
    return grad.new_empty(size, dtype=visible_dtype or grad.dtype), sums


def _tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    visible, bias, mask_token = inputs[:3]
    ctx.set_materialize_grads(False)
    ctx.shown = visible.shape[1]
    ctx.dtypes = visible.dtype, bias.dtype, mask_token.dtype


def _tokens_differentiate(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    visible_wanted, bias_wanted, mask_token_wanted = ctx.needs_input_grad[:3]
    if grad is None or not (visible_wanted or bias_wanted or mask_token_wanted):
        return (None,) * 7
    visible_dtype, bias_dtype, mask_token_dtype = ctx.dtypes
    grad_visible, sums = _tokens_backward(
        grad, ctx.shown, visible_dtype if visible_wanted else None, mask_token_wanted
    )
    return (
        grad_visible if visible_wanted else None,
        sums[0].to(bias_dtype) if bias_wanted else None,
        sums[1].to(mask_token_dtype).view(1, 1, -1) if mask_token_wanted else None,
        *(None,) * 4,
    )


_tokens.register_autograd(_tokens_differentiate, setup_context=_tokens_setup)


@torch.library.custom_op("lmim_fast::append_table_rows", mutates_args=())
def _append(shown: Tensor | None, table: Tensor, ids: Tensor) -> Tensor:
    from lmim_fast.kernels import table_rows

    shown = table.new_empty((ids.shape[0], 0, table.shape[1])) if shown is None else shown
    return table_rows.append_rows(shown, table, ids)


@_append.register_fake
def _(shown, table, ids):  # type: ignore[no-untyped-def]
    rows = ids.shape[1] + (0 if shown is None else shown.shape[1])
    return table.new_empty((ids.shape[0], rows, table.shape[1]))


@torch.library.custom_op("lmim_fast::append_table_rows_backward", mutates_args=())
def _append_backward(
    grad: Tensor, ids: Tensor, patches: int, shown_wanted: bool, table_wanted: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the shown rows and of the table, empty where they are not wanted."""
    from lmim_fast.kernels import table_rows

    count = grad.shape[1] - ids.shape[1]
    grad_shown, grad_table = grad.new_empty(0), grad.new_empty(0)
    if shown_wanted:
        grad_shown = table_rows.append_rows(grad[:, :count], grad.new_empty(0, grad.shape[2]), ids[:, :0])
    if table_wanted:
        grad_table = table_rows.table_gradient(grad[:, count:], ids, patches).to(grad.dtype)
    return grad_shown, grad_table


@_append_backward.register_fake
def _(grad, ids, patches, shown_wanted, table_wanted):  # type: ignore[no-untyped-def]
    batch, rows, width = grad.shape
    shown = grad.new_empty((batch, rows - ids.shape[1], width) if shown_wanted else 0)
    return shown, grad.new_empty((patches, width) if table_wanted else 0)


def _append_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, ids = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(ids)
    ctx.patches = table.shape[0]


def _append_differentiate(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    shown_wanted, table_wanted, _ = ctx.needs_input_grad
    if grad is None:
        return None, None, None
    (ids,) = ctx.saved_tensors
    grad_shown, grad_table = _append_backward(grad, ids, ctx.patches, shown_wanted, table_wanted)
    return grad_shown if shown_wanted else None, grad_table if table_wanted else None, None


_append.register_autograd(_append_differentiate, setup_context=_append_setup)


def _refuses_tokens(
    visible: Tensor,
    bias: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_visible: Tensor,
    ids_masked: Tensor,
    dtype: torch.dtype,
) -> str | None:
    if position.requires_grad and torch.is_grad_enabled():
        return "makes no gradient of position"
    if dtype not in _DTYPES:
        return f"has no kernel for results in {dtype}"
    return None if visible.shape[2] else "takes rows of at least 1 value, got 0"


dispatch.register("decoder_tokens", dispatch.Kernel(launch=_tokens, dtypes=_DTYPES, refuses=_refuses_tokens))
dispatch.register(
    "append_table_rows",
    dispatch.Kernel(
        launch=_append,
        dtypes=_DTYPES,
        refuses=lambda shown, table, ids: None if table.shape[1] else "takes rows of at least 1 value, got 0",
    ),
)
