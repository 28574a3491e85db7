"""Tables of third-party models before and after `accelerate`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import machine, table

_DIRECTIONS = {"forward": "forward", "both": "training"}


def accelerated(result: dict[str, Any]) -> str:
    """What of values, times, kernels and wrappers the result holds."""
    blocks = [f"## accelerate: {result['device']}", machine(result)]
    rows = result["models"]
    if any("differences" in row for row in rows.values()):
        blocks += _values(rows)
    if any("times" in row for row in rows.values()):
        blocks += _times(rows)
    if any("kernels" in row for row in rows.values()):
        blocks += _kernels(rows)
    if any("device" in row for row in rows.values()):
        blocks += _device(rows)
    if "wrappers" in result:
        blocks += _wrappers(result["wrappers"])
    if result["absent"]:
        absent = (f"- {name}: {reason}" for name, reason in result["absent"].items())
        blocks += ["### Not measured", "\n".join(absent)]
    if result["failed"]:
        blocks += ["### Outside the limits", "\n".join(f"- {each}" for each in result["failed"])]
    return "\n\n".join(blocks)


def _values(rows: dict[str, Any]) -> Iterable[str]:
    yield "### Outputs and gradients, fast forms run by PyTorch's operators"
    yield (
        "Largest relative differences of two layers' models, training without dropout and evaluation with "
        "gradients; gradients that are mathematically zero (the bias of keys) are left out."
    )
    head = ("model", "swapped", "fp32 outputs", "fp32 gradients", "fp64 outputs", "fp64 gradients")
    yield table(head, [[name, _named(row["swapped"]), *_largest(row)] for name, row in rows.items()])
    left = [(name, row) for name, row in rows.items() if row["left"] or row["own_forward"]]
    if left:
        yield "Layers left as they are, and swapped ones whose calls ran their own forward:"
        lines = [[name, _named(row["left"]), _named(row["own_forward"])] for name, row in left]
        yield table(("model", "left", "own forward"), lines)


def _largest(row: dict[str, Any]) -> Iterable[str]:
    for dtype in ("fp32", "fp64"):
        found = [each for each in row["differences"] if each["dtype"] == dtype]
        for value in ("output", "gradient"):
            cannot = any("error" in each for each in found)
            yield "cannot run" if cannot else f"{max(each[value] for each in found):.0e}"


def _times(rows: dict[str, Any]) -> Iterable[str]:
    yield "### CPU time before / after, one thread, nothing asked for"
    yield "Medians of rounds; in brackets the ratio of two copies that are alike."
    columns = [(size, direction) for size in ("small", "working") for direction in _DIRECTIONS]
    lines = []
    for name, row in rows.items():
        found = {(each["size"], each["direction"]): each for each in row["times"]}
        cells = (f"{found[column]['ratio']:.3f} ({found[column]['noise']:.3f})" for column in columns)
        lines.append([name, *cells])
    yield table(("model", *(f"{size} {_DIRECTIONS[direction]}" for size, direction in columns)), lines)


def _kernels(rows: dict[str, Any]) -> Iterable[str]:
    yield "### Kernels in Triton's interpreter, a layer, fp32"
    lines = []
    for name, row in rows.items():
        found = row["kernels"]
        launched = sum(found["launches"].values())
        lines.append([name, str(launched), f"{found['output']:.0e}", f"{found['gradient']:.0e}"])
    yield table(("model", "launches", "outputs", "gradients"), lines)


def _device(rows: dict[str, Any]) -> Iterable[str]:
    yield "### Times as fast as the model before, bf16"
    forms = list(next(iter(rows.values()))["device"][0]["ratio"])[1:]
    lines = [
        [name, _DIRECTIONS[each["direction"]], *(f"{each['ratio'][form]:.2f}" for form in forms)]
        for name, row in rows.items()
        for each in row["device"]
    ]
    yield table(("model", "direction", *forms), lines)


def _wrappers(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "### Under wrappers"
    lines = []
    for row in rows:
        line = [row["model"], row["wrapper"], row["order"]]
        if "runs" not in row:
            kind = next(kind for kind in ("refused", "unwrapped", "absent") if kind in row)
            words = {"refused": "refuses", "unwrapped": "so does the model as it is", "absent": "absent"}
            lines.append([*line, f"{words[kind]}: {row[kind]}", "", "", ""])
            continue
        differences = (f"{row[value]:.0e}" for value in ("output", "gradient"))
        lines.append([*line, row["runs"], *differences, "; ".join(row["warnings"])])
    yield table(("model", "wrapper", "order", "runs", "outputs", "gradients", "more warnings"), lines)


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{_short(name)} x {count}" for name, count in counts.items())


def _short(name: str) -> str:
    kind, _, reason = name.partition(": ")
    return kind.rpartition(".")[2] + (f" ({reason})" if reason else "")
