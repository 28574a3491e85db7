"""What `accelerate` did to a model, as rows and as a table; and the way back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from torch import nn

from lmim_fast.layers.fast_forwards.form import notes, unbind


@dataclass(frozen=True)
class Row:
    """One layer.

    name:    dotted name in the model; "" for the model itself.
    kind:    its class, with the module of the class.
    swapped: whether it has its fast form.
    reason:  why it was left alone; of a swapped layer, its first name, or the method where only that is.
    module:  the layer.
    """

    name: str
    kind: str
    swapped: bool
    reason: str
    module: nn.Module

    @property
    def note(self) -> str:
        """The reason, and which calls so far were left to the layer's own forward."""
        own = [f"runs its own forward: {reason}" for reason in notes(self.module)] if self.swapped else []
        return "; ".join(([self.reason] if self.reason else []) + own)


class AccelerationReport:
    """Swapped and left layers of a model; a context manager that undoes the swap at its end.

    Args:
        rows:    of the layers.
        can_run: False in a process without CUDA device, where the swapped layers keep their own forwards.
    """

    def __init__(self, rows: Iterable[Row], can_run: bool = True) -> None:
        self.rows, self.can_run = tuple(rows), can_run

    @property
    def swapped(self) -> list[Row]:
        """Layers with a fast form now."""
        return [row for row in self.rows if row.swapped]

    @property
    def left(self) -> list[Row]:
        """Layers left alone, with the reason."""
        return [row for row in self.rows if not row.swapped]

    def undo(self) -> None:
        """Give each layer that this call swapped its own forward back; a second time does nothing."""
        for row in self.swapped:
            unbind(row.module)

    def table(self) -> str:
        """The rows as text, like rows of a stack folded into one ("blocks.0..11.norm1")."""
        lines = [("layer", "class", "", "why"), *_folded(self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        text = "\n".join(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]
            ).rstrip()
            for line in lines
        )
        last = "" if self.can_run else "\nno CUDA device in this process: the layers' own forwards run"
        return f"{text}\n{len(self.swapped)} swapped, {len(self.left)} left{last}"

    __str__ = table

    def __enter__(self) -> AccelerationReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _folded(rows: Iterable[Row]) -> list[tuple[str, str, str, str]]:
    """Rows that differ in the numbers of their names alone, as one."""
    groups: dict[tuple[object, ...], list[list[str]]] = {}
    for row in rows:
        parts = row.name.split(".")
        shape = tuple("#" if part.isdecimal() else part for part in parts)
        groups.setdefault((shape, row.kind, row.swapped, row.note), []).append(parts)
    lines = []
    for (_, kind, swapped, note), names in groups.items():
        name = _span(names) or "(the model)"
        times = f" x {len(names)}" if len(names) > 1 else ""
        lines.append((name + times, str(kind), "swapped" if swapped else "left", str(note)))
    return lines


def _span(names: list[list[str]]) -> str:
    """One name for several: each part that varies as lowest..highest, or as a list where some are missing."""
    parts = []
    for values in zip(*names, strict=True):
        different = sorted(set(values), key=lambda value: (len(value), value))
        if len(different) == 1:
            parts.append(different[0])
        elif int(different[-1]) - int(different[0]) == len(different) - 1:
            parts.append(f"{different[0]}..{different[-1]}")
        else:
            parts.append(f"{{{','.join(different)}}}")
    return ".".join(parts)
