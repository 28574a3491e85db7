"""What the training step has to reach, by card, and what a folder of results says of it.

80 % of the step's floor: ViT-S, B=512, dropout 0, bf16. Everything else is a ratio within one run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

IMAGES_PER_SECOND = {"H200": 7100, "H100": 5960}  # by a part of the device's name
PRESET, BATCH, SMALL_BATCH = "small", 512, 64
AGAINST_RELEASED, AGAINST_COMPILED = 3.0, 1.6
SHARE_OF_MEMORY = 0.6  # at most, of "compiled"
SHARE_AT_SMALL_BATCH = 0.9  # of the rate at 512
SHARE_WITH_DROPOUT = 0.95  # of the rate without
OURS = ("ours", "ours+epilogue", "ours+bias", "ours+rows", "ours+compile", "ours+graph")


def images_per_second(device: str, row: dict[str, Any], preset: str) -> int | None:
    """The goal of a row of the step benchmark; None if there is none for it."""
    if (preset, row["batch"], row["dropout"]) != (PRESET, BATCH, 0.0) or row["variant"] not in OURS:
        return None
    return next((goal for card, goal in IMAGES_PER_SECOND.items() if card in device), None)


def lines(folder: Path) -> list[str]:
    """A line a goal that the steps in a folder say something of: what is reached, and the goal."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("benchmark") == "step" and result["preset"] == PRESET and not result.get("dry_run"):
            found += [row | {"device": result["device"]} for row in result["rows"]]

    def best(batch: int, dropout: float, *variants: str) -> dict[str, Any] | None:
        rows = [row for row in found if (row["batch"], row["dropout"]) == (batch, dropout)]
        chosen = [row for row in rows if row["variant"] in variants]
        return max(chosen, key=lambda row: row["images_per_second"], default=None)

    ours = best(BATCH, 0.0, *OURS)
    if ours is None:
        return []
    rate, told = ours["images_per_second"], list[str]()
    if goal := images_per_second(ours["device"], ours, PRESET):
        told.append(f"B={BATCH}: {rate:,.0f} images/s ({ours['variant']}), goal {goal:,}")
    others = [
        ("released", AGAINST_RELEASED, best(BATCH, 0.0, "released")),
        ("compiled", AGAINST_COMPILED, best(BATCH, 0.0, "compiled")),
    ]
    told += [
        f"{rate / row['images_per_second']:.2f}x {name}, goal {ratio}x" for name, ratio, row in others if row
    ]
    compiled = others[1][2]
    if compiled and compiled["peak_memory"] and ours["peak_memory"]:
        share = ours["peak_memory"] / compiled["peak_memory"]
        told.append(f"peak memory {share:.2f} of compiled, goal {SHARE_OF_MEMORY}")
    if small := best(SMALL_BATCH, 0.0, *OURS):
        share = small["images_per_second"] / rate
        reached = f"B={SMALL_BATCH} ({small['variant']}): {share:.2f} of the rate at {BATCH}"
        told.append(f"{reached}, goal {SHARE_AT_SMALL_BATCH}")
    if dropped := best(BATCH, 0.1, *OURS):
        share = dropped["images_per_second"] / rate
        told.append(f"dropout 0.1: {share:.2f} of the rate without, goal {SHARE_WITH_DROPOUT}")
    return told
