"""Tables of third-party models before and after `accelerate`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import machine, table

_EVERYWHERE = ("torch.nn.modules.linear.Linear: no", "torch.nn.modules.conv.", "torch.nn.modules.sparse.")
_DIRECTIONS = {"forward": "forward", "both": "training"}


def accelerated(result: dict[str, Any]) -> str:
    """What of values, times, kernels, wrappers and device times the result holds."""
    blocks = [f"## accelerate: {result['device']}", machine(result)]
    rows = result["models"]
    if any("device" in row for row in rows.values()):
        blocks += _device(rows)
    elif rows:
        blocks += _models(rows)
    if "wrappers" in result:
        blocks += _wrappers(result["wrappers"])
    if result["absent"]:
        absent = (f"- {name}: {reason}" for name, reason in result["absent"].items())
        blocks += ["### Not measured", "\n".join(absent)]
    if result["failed"]:
        blocks += ["### Outside the limits", "\n".join(f"- {each}" for each in result["failed"])]
    return "\n\n".join(blocks)


def _models(rows: dict[str, Any]) -> Iterable[str]:
    yield (
        "Third-party models before and after. Differences: the largest relative ones of outputs and "
        "gradients, training without dropout, evaluation, frozen; the fast forms run by PyTorch's operators. "
        "Kernels: launches of a layer, forward and backward, in Triton's interpreter. Times: CPU time "
        "before / after on one thread, in a process without a device, where nothing is bound; in brackets "
        "the ratio of two copies that are alike."
    )
    columns = [(size, direction) for size in ("small", "working") for direction in _DIRECTIONS]
    head = ("model", "fp32 outputs", "fp32 gradients", "fp64 gradients", "kernels")
    lines = []
    for name, row in rows.items():
        found = {(each["size"], each["direction"]): each for each in row.get("times", ())}
        times = [
            f"{found[each]['ratio']:.3f} ({found[each]['noise']:.3f})" if each in found else ""
            for each in columns
        ]
        launched = str(sum(row["kernels"]["launches"].values())) if "kernels" in row else ""
        lines.append([name, *_largest(row), launched, *times])
    yield table((*head, *(f"{size} {_DIRECTIONS[direction]}" for size, direction in columns)), lines)
    lines = [
        [name, _named(row["swapped"]), _named(row["left"]), _named(row["own_forward"])]
        for name, row in rows.items()
        if "swapped" in row
    ]
    if lines:
        yield "Layers swapped; left, without linears, convolutions, embeddings; calls of own forwards:"
        yield table(("model", "swapped", "left", "own forward"), lines)


def _largest(row: dict[str, Any]) -> Iterable[str]:
    for dtype, value in (("fp32", "output"), ("fp32", "gradient"), ("fp64", "gradient")):
        found = [each for each in row.get("differences", ()) if each["dtype"] == dtype]
        cannot = any("error" in each for each in found)
        yield "cannot run" if cannot else f"{max((each[value] for each in found), default=0):.0e}"


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
    yield (
        "fast: the fast forms run; in part: some layers run their own forward; original: all do. In brackets "
        "the larger difference of outputs and gradients from the same wrapper around the model as it is."
    )
    names = list(dict.fromkeys(row["model"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["wrapper"], row["order"]), {})[row["model"]] = _wrapped(row)
    lines = [[*key, *(found.get(name, "") for name in names)] for key, found in cells.items()]
    yield table(("wrapper", "order", *names), lines)


def _wrapped(row: dict[str, Any]) -> str:
    if "runs" in row:
        warned = f"; {'; '.join(row['warnings'])}" if row["warnings"] else ""
        return f"{row['runs']} ({max(row['output'], row['gradient']):.0e}){warned}"
    kind = next(kind for kind in ("refused", "unwrapped", "absent") if kind in row)
    words = {"refused": "refuses", "unwrapped": "so does the model as it is", "absent": "absent"}
    return f"{words[kind]}: {row[kind]}"


def _named(counts: dict[str, int]) -> str:
    shown = {name: count for name, count in counts.items() if not name.startswith(_EVERYWHERE)}
    return ", ".join(f"{_short(name)} x {count}" for name, count in shown.items())


def _short(name: str) -> str:
    kind, _, reason = name.partition(": ")
    return kind.rpartition(".")[2] + (f" ({reason})" if reason else "")
