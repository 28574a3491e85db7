"""A csv with a header."""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator

from lmim_fast.config.collections import ImportConfig
from lmim_fast.data.importers.entries import Entry, Reject
from lmim_fast.data.importers.lists import SEPARATORS, ListPart
from lmim_fast.data.visible import visible
from lmim_fast.errors import UsageError


class Csv(ListPart):
    """Rows with a path and a label column; fields in quotes may hold separators and line breaks.

    Raises:
        UsageError: the header cannot be read, or lacks a column or has it twice.
    """

    def __init__(self, path: str, config: ImportConfig) -> None:
        super().__init__(path, config)
        self._separator = config.separator or "comma"
        rows = self._rows([])
        try:
            header = next(rows)[1]
        except StopIteration:
            raise UsageError(
                f"{visible(path)}: no header can be read; a csv begins with the names of its columns"
            ) from None
        finally:
            rows.close()
        self._path_column = self._column(header, config.path_column, "--path-column")
        self._label_column = (
            None
            if config.label_column is None
            else self._column(header, config.label_column, "--label-column")
        )

    def _column(self, header: list[str], name: str, option: str) -> int:
        if header.count(name) == 1:
            return header.index(name)
        found = "twice" if name in header else "not there"
        listed = ", ".join(map(visible, header[:20]))
        others = "" if len(header) > 1 else " (one column only: is --separator right?)"
        raise UsageError(
            f"{visible(self.path)}: column {name!r} is {found}; {option} names one of: {listed}{others}"
        )

    def _all_entries(self) -> Iterator[Entry]:
        refused: list[Reject] = []
        rows = self._rows(refused)
        next(rows, None)
        needed = max(self._path_column, self._label_column or 0)
        for number, row in rows:
            yield from refused
            refused.clear()
            if len(row) <= needed:
                yield Reject(self.where(number), "too few columns", f"{len(row)} of {needed + 1}")
                continue
            label = None if self._label_column is None else row[self._label_column]
            yield self.item(self.where(number), row[self._path_column], label)
        yield from refused

    def _rows(self, refused: list[Reject]) -> Generator[tuple[int, list[str]], None, None]:
        """Number of its last line, and fields of each row; what is no row is appended to `refused`."""
        number = 0

        def texts() -> Iterator[str]:
            nonlocal number
            for line in self.lines():
                number = line.number
                if line.text is None:
                    refused.append(Reject(self.where(number), line.reason))
                else:
                    yield line.text + "\n"

        reader = csv.reader(texts(), delimiter=SEPARATORS[self._separator])
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # a quote that is never closed ends at the size limit of a field
                refused.append(Reject(self.where(number), "not csv", str(error)))
                continue
            yield number, row
