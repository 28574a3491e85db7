"""Rows of the decoder and their projections: plain, or with masked rows that come from one table."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lmim_fast.ops.linear import compute_dtype, linear
from lmim_fast.ops.tokens import append_table_rows


class Memory(NamedTuple):
    """What the rows of a layer attend to, and the projection of their queries."""

    kv: Tensor
    """(B, M, 2D) keys and values, without bias."""
    kv_bias: Tensor | None
    """(2D,)."""
    q_weight: Tensor
    """(D, D)."""
    q_bias: Tensor | None
    """(D,)."""
    added: bool
    """kv has its bias, and queries get theirs in their product."""


class PlainRows:
    """Rows (B, N, D): the first `num_visible_rows` of each image are cls and visible, the others masked.

    Args:
        num_visible_rows: see above.
        rows:             what projections read.
        masked:           the masked rows (B, M, D), contiguous, if only their queries are needed; None: they
                          are copied from rows on demand.
        residual:         what a residual add reads: rows, or masked where that is given, as a tensor of its
                          own, so that the gradients of both are added where the rows come from.
    """

    def __init__(
        self,
        num_visible_rows: int,
        rows: Tensor,
        masked: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        self.rows, self.num_visible_rows, self._masked = rows, num_visible_rows, masked
        self.residual = rows if residual is None else residual

    @property
    def masked(self) -> Tensor:
        """The masked rows (B, M, D), copied only once; the residual is of them from then on."""
        if self._masked is None:
            self._masked = self.residual = self.rows[:, self.num_visible_rows :].contiguous()
        return self._masked

    @property
    def masked_residual(self) -> Tensor:
        """The residual of the masked rows (B, M, D)."""
        return self.residual if self._masked is not None else self.masked

    def project(self, weight: Tensor, *, masked_only: bool = False, added: Tensor | None = None) -> Tensor:
        """All rows, or only the masked ones, times weight.T; `added` as for `linear`."""
        rows = self.masked if masked_only else self.rows
        return linear(rows.to(compute_dtype(weight)), weight, added=added)


class MaskedRows(PlainRows):
    """Rows whose masked part is `table[ids_masked]`: the table is projected once for all images.

    Args:
        rows:       all rows (B, N, D).
        shown:      the rows (B, N - M, D) before the masked ones, as a tensor of its own.
        table:      (L, D) masked row of each patch.
        ids_masked: (B, M).
    """

    def __init__(self, rows: Tensor, shown: Tensor, table: Tensor, ids_masked: Tensor) -> None:
        super().__init__(shown.shape[1], rows)
        self.shown, self.table, self.ids_masked = shown, table, ids_masked

    def project(self, weight: Tensor, *, masked_only: bool = False, added: Tensor | None = None) -> Tensor:
        """All rows, or only the masked ones, times weight.T; `added` as for `linear`."""
        visible = None if masked_only else linear(self.shown, weight, added=added)
        return append_table_rows(visible, linear(self.table, weight, added=added), self.ids_masked)
