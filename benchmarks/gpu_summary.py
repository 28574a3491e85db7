"""summary.txt of a folder of results: a line a part, then what the steps say of the goals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.gpu_stages import NAMES

_LENGTH = 400  # characters of a failure


def line(result: dict[str, Any]) -> str:
    """What came of a part."""
    name, verdict = f"{NAMES[result['stage']]} {result['part']}", result["verdict"]
    text = f"{name}: {verdict.upper() if verdict == 'red' else verdict}"
    if result["exit"] not in (0, 3):
        text += f" ({result['exit']})"
    text += "" if result["counts"] else " (reported only)"
    text += f", {result['seconds']:.0f} s"
    if headline := result.get("headline"):
        text += f". {headline}"
    if verdict in ("red", "absent"):
        text += f". {_reason(result)}"
    if remedy := result.get("remedy"):
        text += f"\n    REMEDY: export LMIM_FAST_ROUTES={remedy!r}: the parts after it ran with it"
    return text


def _reason(result: dict[str, Any]) -> str:
    """The first failure; else the last line that was printed."""
    if result["failed"]:
        first = result["failed"][0]
        about = ", ".join(str(value) for name, value in first.items() if name != "error")
        return f"{about}: {first['error']}"[:_LENGTH].replace("\n", " ")
    printed = result["output"].strip().splitlines()
    return printed[-1][:_LENGTH] if printed else "it printed nothing"


def text(folder: Path) -> str:
    """Of all parts in a folder, in the order of the stages."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = sorted((one for one in found if "stage" in one), key=lambda one: (one["stage"], one["order"]))
    lines = []
    for one in found:
        versions = ", ".join(f"{name} {one['versions'].get(name)}" for name in ("torch", "triton"))
        machine = f"{one['device']}, {versions}, commit {one['commit']}"
        machine = f"DRY RUN, no figure counts: {machine}" if one.get("dry_run") else machine
        lines += [] if machine in lines else [machine]
        lines.append(line(one))
    reached = goals.lines(folder)
    return "\n".join(lines + (["Goals:", *reached] if reached else [])) + "\n"


def write(folder: Path) -> None:
    """Write it, so that it is whole however the process ends."""
    part = folder / "summary.part"
    part.write_text(text(folder), encoding="utf-8")
    part.replace(folder / "summary.txt")
