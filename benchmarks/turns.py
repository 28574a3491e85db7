"""Forms that are timed in turn, in an order that changes each round, so that all meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def in_turn(runs: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """What each run returns in each round.

    Args:
        runs:   by form; each returns the time that it took.
        rounds: that count.
        warmup: rounds before them, whose times are left out.
    """
    times: dict[str, list[float]] = {form: [] for form in runs}
    for number in range(warmup + rounds):
        for form in list(runs)[:: 1 if number % 2 else -1]:
            spent = runs[form]()
            if number >= warmup:
                times[form].append(spent)
    return times


def cpu_microseconds(run: Callable[[], object], calls: int) -> float:
    """CPU time of this process for a call, the mean of `calls`."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return 1e6 * (time.process_time() - start) / calls
