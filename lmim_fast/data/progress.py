"""A progress bar with records per second, on a terminal's standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lmim_fast.data.console import SafeConsole

Advance = Callable[[float, int], None]


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Advance]:
    """A bar, and the function that moves it: to a share (0 .. 1) and a number of records of this run.

    Where standard error is no terminal, nothing is shown.
    """
    console = SafeConsole(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[records]:,} records"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(description, total=1.0, records=0, rate=0.0)

        def advance(share: float, records: int) -> None:
            rate = records / max(progress.tasks[0].elapsed or 0.0, 1e-3)
            progress.update(task, completed=share, records=records, rate=rate)

        yield advance
