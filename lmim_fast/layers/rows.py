"""Decoder rows as their projections are made: plain, or with a masked part made from one table."""

from __future__ import annotations

import torch
from torch import Tensor

from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.tokens import gather_table


class MaskedRows:
    """Rows whose masked part is `table[ids]`: projections of that part are made once for all images."""

    def __init__(self, rows: Tensor, table: Tensor, ids_masked: Tensor) -> None:
        self.rows, self.table, self.ids = rows, table, ids_masked
        self.num_shown = rows.shape[1] - ids_masked.shape[1]

    def project(self, weight: Tensor, *, masked_only: bool = False) -> Tensor:
        """All rows, or the masked ones, times weight.T."""
        masked = gather_table(linear(self.table, weight), self.ids)
        if masked_only:
            return masked
        return torch.cat([linear(self.rows[:, : self.num_shown], weight), masked], dim=1)


class PlainRows:
    """Rows with nothing known about them; the same interface as `MaskedRows`."""

    def __init__(self, rows: Tensor, num_shown: int) -> None:
        self.rows, self.num_shown = rows, num_shown

    def project(self, weight: Tensor, *, masked_only: bool = False) -> Tensor:
        """All rows, or the masked ones, times weight.T."""
        rows = self.rows[:, self.num_shown :] if masked_only else self.rows
        return linear(rows.to(compute_dtype(weight)), weight)
