"""Decoder rows as their projections are made: plain, or with a masked part made from one table."""

from __future__ import annotations

from torch import Tensor

from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.tokens import append_table_rows


class PlainRows:
    """Rows (B, N, D), the first `num_shown` of each sequence cls and visible, the others masked."""

    def __init__(self, rows: Tensor, num_shown: int) -> None:
        self.rows, self.num_shown = rows, num_shown
        self._masked: Tensor | None = None  # functools.cached_property does not compile

    @property
    def masked(self) -> Tensor:
        """The masked rows (B, M, D), copied once for all who read them."""
        if self._masked is None:
            self._masked = self.rows[:, self.num_shown :].contiguous()
        return self._masked

    def project(self, weight: Tensor, *, masked_only: bool = False) -> Tensor:
        """All rows, or the masked ones, times weight.T."""
        rows = self.masked if masked_only else self.rows
        return linear(rows.to(compute_dtype(weight)), weight)


class MaskedRows(PlainRows):
    """Rows whose masked part is `table[ids]`: projections of that part are made once for all images."""

    def __init__(self, rows: Tensor, table: Tensor, ids_masked: Tensor) -> None:
        super().__init__(rows, rows.shape[1] - ids_masked.shape[1])
        self.table, self.ids = table, ids_masked

    def project(self, weight: Tensor, *, masked_only: bool = False) -> Tensor:
        """All rows, or the masked ones, times weight.T."""
        shown = None if masked_only else linear(self.rows[:, : self.num_shown], weight)
        return append_table_rows(shown, linear(self.table, weight), self.ids)
