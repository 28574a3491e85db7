"""Tables of the host's CPU time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import machine, table

_PARTS = ("forward", "backward", "update")
_DIRECTIONS = {"forward": "forward, no gradients", "both": "forward and backward"}


def host(result: dict[str, Any]) -> str:
    """What of a step, of calls, of launches and of data the result holds."""
    blocks = [f"## Host time: {result['device']}", f"{machine(result)} CPU time; medians."]
    if "step" in result:
        blocks += _step(result["step"])
    if "calls" in result:
        blocks += _calls(result["calls"])
    if "launch" in result:
        blocks += _launch(result["launch"])
    if "data" in result:
        blocks += _data(result["data"])
    return "\n\n".join(blocks)


def _step(step: dict[str, Any]) -> Iterable[str]:
    tokens, rows = step["tokens"], step["rows"]
    yield "### A training step, kernels recorded and not run"
    yield (
        f"LMIM with ViT-S's depth and tiny widths, {tokens['timed']} tokens. "
        "Ratio: the median of the rounds' ratios; below 1 ours is the cheaper one."
    )
    lines = []
    for row in rows:
        ours, reference = row["milliseconds"]["ours"], row["milliseconds"]["reference"]
        for part, ratio in row["ratio"].items():
            name = part if part in (*_PARTS, "step") else f"forward: {part}"
            times = [_milliseconds(ours[part]), _milliseconds(reference[part])]
            lines.append([row["precision"], name, *times, f"{ratio:.2f}"])
    yield table(("precision", "part", "ours ms", "reference ms", "ratio"), lines)
    yield (
        f"What a step of {tokens['counted']} tokens and 2 images asks for: kernels of ours; operators of "
        "PyTorch that launch on a GPU, and all others (views, empty memory, those made of others), by "
        "PyTorch's profiler."
    )
    yield table(
        ("precision", "part", "kernels", "ours: launching", "others", "reference: launching", "others"),
        [line for row in rows for line in _counts(row)],
    )
    row = rows[0]
    yield (f"Kernels of a step in {row['precision']}; Python frames from a block's forward to their launch.")
    yield table(("kernel", *_PARTS, "frames"), _kernels(row))


def _counts(row: dict[str, Any]) -> Iterable[list[str]]:
    counts = []
    for part in _PARTS:
        line = [sum(row["launches"][part].values())]
        for form in ("ours", "reference"):
            found = row["operators"][form][part]
            line += [found["launching"], found["others"]]
        counts.append(line)
    counts.append([sum(column) for column in zip(*counts, strict=True)])
    for part, line in zip((*_PARTS, "step"), counts, strict=True):
        yield [row["precision"], part, *(f"{count:,}" for count in line)]


def _kernels(row: dict[str, Any]) -> Iterable[list[str]]:
    launches, hops = row["launches"], row["hops"]
    for name in sorted({name for part in _PARTS for name in launches[part]}):
        frames = "-".join(str(count) for count in sorted(set(hops.get(name, ()))))
        yield [f"`{name}`", *(str(launches[part].get(name, 0)) for part in _PARTS), frames]
    most = [count for pair in hops.values() for count in pair]
    yield ["all", *(str(sum(launches[part].values())) for part in _PARTS), f"{min(most)}-{max(most)}"]


def _calls(calls: dict[str, Any]) -> Iterable[str]:
    yield "### Eager calls of layers"
    yield f"On a CPU without kernels, x {tuple(calls['shape'])} in fp32, against PyTorch's modules."
    lines = []
    for row in calls["rows"]:
        ours, plain = (statistics.median(row["microseconds"][form]) for form in ("ours", "plain"))
        line = [row["layer"], _DIRECTIONS[row["direction"]], f"{ours:,.1f}", f"{plain:,.1f}"]
        lines.append([*line, f"{row['difference']:+,.1f}"])
    yield table(("layer", "direction", "ours us", "PyTorch us", "difference us"), lines)


def _launch(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "### Launches on a driver that does nothing"
    yield (
        "Through Triton's JIT, and by calling the compiled kernel (`LMIM_FAST_LAUNCH=direct`); handing the "
        "arguments to CUDA, which costs both alike, is in neither time."
    )
    lines = []
    for row in rows:
        through, directly = (statistics.median(row["microseconds"][path]) for path in ("triton", "direct"))
        times = [f"{through:.1f}", f"{directly:.1f}", f"{directly / through:.2f}"]
        lines.append([f"`{row['kernel']}`", str(row["arguments"]), *times])
    yield table(("kernel", "arguments", "JIT us", "direct us", "ratio"), lines)


def _data(data: dict[str, Any]) -> Iterable[str]:
    yield "### Preparing batches: serial work of a process"
    source = "rendered words" if data["source"] == "rendered" else ", ".join(data["source"])
    records = f", {data['records']:,} records" if "records" in data else ""
    about = f"Both views; {source}{records}, batches of {data['batch']}."
    if "images_per_second" in data:
        about += f" At best {data['images_per_second']:,.0f} images/s in one process."
    about += "".join(f" Without {part}: {reason}." for part, reason in data["left_out"].items())
    yield about
    if data["microseconds"]:
        rows = [[part, f"{statistics.median(times):.1f}"] for part, times in data["microseconds"].items()]
        yield table(("part", "us an image"), rows)


def _milliseconds(times: list[float]) -> str:
    return f"{statistics.median(times):.2f}"
