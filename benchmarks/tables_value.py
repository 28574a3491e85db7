"""The table of what pre-training is worth, for `benchmarks/value.py` and `benchmarks/tables.py`."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.markdown import machine, table

_STARTS = {"scratch": "random", "mae": "MAE", "lmim": "LMIM"}


def value(result: dict[str, Any]) -> str:
    """A line a start, at equal fine-tuning steps and at equal total time."""
    names = list(result["rows"][0]["scores"])
    size = result["size"]
    rows = [
        [
            row["at"],
            _STARTS[row["start"]],
            f"{row['steps']:,}",
            f"{row['seconds']:,.0f}",
            *(_spread(row["scores"][name]) for name in names),
        ]
        for row in result["rows"]
    ]
    about = (
        f"Pre-trained for {size['mae_steps']:,} steps of MAE and {size['lmim_steps']:,} of LMIM. Word "
        f"accuracy in %: mean ± standard deviation over {len(result['seeds'])} seeds of fine-tuning. Seconds "
        f"are of training, pre-training included; {result['jobs']} runs at a time share the cores."
    )
    title = f"## What pre-training is worth: {size['preset']}, {result['data']}"
    head = ("compared at", "start", "fine-tuning steps", "seconds", *names)
    return "\n\n".join([title, machine(result), about, table(head, rows)])


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
