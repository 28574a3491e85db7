"""Tables of processes that share a model, and of checkpoints."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.markdown import machine, table

_SAVES = {
    "here and now": "stall, written here and now",
    "asynchronous": "stall, asynchronous",
    "background": "background, until it is published",
    "device": "device, busy with the copies",
}


def parallel(result: dict[str, Any]) -> str:
    """A line a form: its step, against DDP's in the same rounds, and what a process keeps."""
    by_name = {row["form"]: row for row in result["rows"]}
    rows = []
    for name, row in by_name.items():
        times = row["milliseconds"]
        ratios = [ddp / own for ddp, own in zip(by_name["DDP"]["milliseconds"], times, strict=True)]
        rows.append(
            [
                name,
                f"{statistics.median(times):,.0f}",
                f"{min(times):,.0f}",
                f"{statistics.median(ratios):.2f}x",
                f"{row['bytes_per_rank'] / 1e6:,.0f}",
            ]
        )
    title = f"## Processes that share a model: {result['preset']}, {result['ranks']} processes on gloo"
    about = f"A step of {result['batch']} images in all. Speed: of DDP's step in the same round, the median."
    head = ("form", "ms", "fastest", "speed", "MB a process")
    return "\n\n".join([title, machine(result), about, table(head, rows)])


def checkpoint(result: dict[str, Any]) -> str:
    """How long training stands still for a checkpoint."""
    rows = [
        [_SAVES[name], f"{statistics.median(times):,.0f}", f"{min(times):,.0f}", f"{max(times):,.0f}"]
        for name, times in result["milliseconds"].items()
    ]
    title = f"## Checkpoints: {result['preset']}, {result['device']}"
    about = f"{result['bytes'] / 1e6:,.0f} MB each: weights and moments."
    return "\n\n".join([title, machine(result), about, table(("ms", "median", "lowest", "highest"), rows)])
