"""Tables of a profile of the step and of the model against the oracle, for `benchmarks/tables.py`."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import machine, table

_KERNELS = 20  # of a profile
_TENSORS = 8  # of a comparison
_NAME = 90  # characters of a kernel's


def profile(result: dict[str, Any]) -> str:
    """How busy device and host are in a step, and the kernels that take most of it."""
    names = ("wall", "busy", "host", "cpu")
    head = ("variant", *(f"{name} ms" for name in names), "device idle", "launches")
    totals = [
        [
            row["variant"],
            *(f"{row[f'{name}_milliseconds']:,.2f}" for name in names),
            f"{row['idle_share']:.0%}",
            f"{row['launches']:,.0f}",
        ]
        for row in result["totals"]
    ]
    parts = [
        f"## Profile of a step: {result['preset']}, {result['device']}",
        machine(result),
        "busy: at least one kernel runs; host: until the last launch has returned; cpu: of all threads.",
        table(head, totals),
    ]
    for variant in dict.fromkeys(row["variant"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["variant"] == variant][:_KERNELS]
        lines = [
            [
                "`" + row["kernel"][:_NAME].replace("|", "/") + "`",
                f"{row['calls']:,.1f}",
                f"{row['microseconds']:,.1f}",
                f"{row['share']:.1%}",
            ]
            for row in rows
        ]
        parts.append(table((f"kernel of {variant}", "calls", "us a step", "share"), lines))
    return "\n\n".join(parts)


def parity(result: dict[str, Any]) -> str:
    """The loss, and the gradients that come nearest to what is allowed."""
    losses = [row for row in result["rows"] if row["tensor"] == "loss"]
    others = [row for row in result["rows"] if row["tensor"] != "loss"]
    worst = sorted(others, key=lambda row: -row["error"] / row["allowed"])[:_TENSORS]
    lines = [
        [
            row["tensor"],
            row["residual"],
            *(f"{row[name]:.2e}" for name in ("error", "plain_error", "allowed")),
        ]
        for row in losses + worst
    ]
    wrong = sum(not row["right"] for row in result["rows"])
    note = (
        f"Relative L2 errors of {len(result['rows'])} tensors against fp32, {wrong} of them wrong; the worst:"
    )
    head = ("tensor", "residual", "ours in bf16", "oracle in bf16", "allowed")
    title = f"## Against the oracle: {result['preset']}, B={result['batch']}, {result['device']}"
    return "\n\n".join([title, machine(result), note, table(head, lines)])
