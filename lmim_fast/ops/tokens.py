"""Decoder input tokens, ordered cls, visible, masked: no scatter, since attention has no order."""

from __future__ import annotations

import torch
from torch import Tensor

from lmim_fast.ops.dispatch import run


def decoder_tokens(
    visible: Tensor,
    bias: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_visible: Tensor,
    ids_masked: Tensor,
) -> Tensor:
    """Add bias and positions to the visible tokens and append the mask tokens.

    Args:
        visible:     (B, 1 + K, D) embedded latent without its bias, cls first.
        bias:        (D,) of the linear that made it.
        mask_token:  (1, 1, D).
        position:    (1, 1 + L, D), row 0 for cls.
        ids_visible: (B, K) patches of the visible rows.
        ids_masked:  (B, L - K) patches of the others.
    Returns:
        (B, 1 + L, D) in position's dtype: cls, the rows of ids_visible, those of ids_masked.
    Raises:
        ValueError: the ids and tokens do not fit each other.
    """
    if (
        visible.shape[1] != 1 + ids_visible.shape[1]
        or position.shape[1] != visible.shape[1] + ids_masked.shape[1]
    ):
        raise ValueError(
            "need visible (B, 1+K, D), ids_visible (B, K), ids_masked (B, M), position (1, 1+K+M, D); got "
            f"{[tuple(t.shape) for t in (visible, ids_visible, ids_masked, position)]}"
        )
    return run("decoder_tokens", _eager, visible, bias, mask_token, position, ids_visible, ids_masked)


def _eager(
    visible: Tensor,
    bias: Tensor,
    mask_token: Tensor,
    position: Tensor,
    ids_visible: Tensor,
    ids_masked: Tensor,
) -> Tensor:
    dtype = position.dtype
    place = torch.cat(
        [position[:, :1].expand(len(visible), -1, -1), gather_table(position[0, 1:], ids_visible)], dim=1
    )
    shown = visible.to(dtype) + (place + bias.to(dtype))
    return torch.cat([shown, gather_table(mask_table(mask_token, position), ids_masked)], dim=1)


def mask_table(mask_token: Tensor, position: Tensor) -> Tensor:
    """Decoder input of every patch when it is masked, (L, D): the same for all images."""
    return mask_token[0].to(position.dtype) + position[0, 1:]


def gather_table(table: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (B, M), unique in an image, of a table (L, D), as (B, M, D).

    Not `table[ids]`, whose backward adds with atomics: its result changes from run to run.
    """
    expanded = table.expand(ids.shape[0], -1, -1)
    return expanded.gather(1, ids[:, :, None].expand(-1, -1, table.shape[1]))
