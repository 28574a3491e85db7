"""Rows of the decoder and their projections: plain, or with masked rows that come from one table."""

from __future__ import annotations

from torch import Tensor

from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.tokens import append_table_rows


class PlainRows:
    """Rows (B, N, D): the first `num_visible_rows` of each image are cls and visible, the others masked."""

    def __init__(self, rows: Tensor, num_visible_rows: int) -> None:
        self.rows, self.num_visible_rows = rows, num_visible_rows
        self._masked: Tensor | None = None  # functools.cached_property does not compile

    @property
    def masked(self) -> Tensor:
        """The masked rows (B, M, D), contiguous and copied only once."""
        if self._masked is None:
            self._masked = self.rows[:, self.num_visible_rows :].contiguous()
        return self._masked

    def project(self, weight: Tensor, *, masked_only: bool = False) -> Tensor:
        """All rows, or only the masked ones, times weight.T."""
        rows = self.masked if masked_only else self.rows
        return linear(rows.to(compute_dtype(weight)), weight)


class MaskedRows(PlainRows):
    """Rows whose masked part is `table[ids_masked]`: the table is projected once for all images."""

    def __init__(self, rows: Tensor, table: Tensor, ids_masked: Tensor) -> None:
        super().__init__(rows, rows.shape[1] - ids_masked.shape[1])
        self.table, self.ids_masked = table, ids_masked

    def project(self, weight: Tensor, *, masked_only: bool = False) -> Tensor:
        """All rows, or only the masked ones, times weight.T."""
        visible = None if masked_only else linear(self.rows[:, : self.num_visible_rows], weight)
        return append_table_rows(visible, linear(self.table, weight), self.ids_masked)
