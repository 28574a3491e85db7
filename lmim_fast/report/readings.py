"""What a recogniser's run measured while it trained: accuracy over the steps, and wrong readings."""

from __future__ import annotations

import html
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmim_fast.config import FinetuneConfig
from lmim_fast.data.dali import BrokenImages, DaliViews, Stage
from lmim_fast.data.visible import visible
from lmim_fast.errors import LmimError
from lmim_fast.report.charts import COLOURS, Chart, Series, chart_html
from lmim_fast.report.images import crop_html
from lmim_fast.report.page import warning
from lmim_fast.report.run import Run, json_row, number, read_text
from lmim_fast.train.side_files import VALIDATION_FILE, WRONG_FILE
from lmim_fast.train.start import open_records


def validation_html(run: Run) -> list[str]:
    """The sections about validation; none for a run without."""
    lines = _lines(run.folder / VALIDATION_FILE)
    if not lines:
        return []
    steps = np.array([line["step"] for line in lines])
    names = list(lines[-1]["sets"])
    colours = itertools.cycle(COLOURS)
    charts = [
        Chart(
            title,
            tuple(
                Series(
                    name, np.array([line["sets"].get(name, {}).get(key, np.nan) for line in lines]), colour
                )
                for name, colour in zip(names, colours, strict=False)
            ),
            percent=True,
            smooth=False,
        )
        for title, key in (("Word accuracy", "accuracy"), ("1 - normalised edit distance", "ned"))
    ]
    best = max(lines, key=lambda line: (line["accuracy"], -line["step"]))
    intro = (
        f"<p>Best: {best['accuracy']:.2%} mean accuracy at step {best['step']:,}, kept in best/; "
        f"last: {lines[-1]['accuracy']:.2%}. Case and symbols do not count.</p>"
    )
    drawn = [chart_html(chart, steps, f"validation{place}") for place, chart in enumerate(charts)]
    return [f'<h2>Validation</h2>{intro}<div class="charts">{"".join(drawn)}</div>', *_wrong_html(run)]


def _wrong_html(run: Run) -> list[str]:
    path = run.folder / WRONG_FILE
    if not path.is_file():
        return []
    try:
        document = json.loads(read_text(path))
        known = isinstance(document["step"], int) and all(map(_is_reading, document["wrong"]))
    except (LmimError, ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        return [
            "<h2>Wrong readings</h2>" + warning(f"{WRONG_FILE} is damaged: the next validation writes it.")
        ]
    title = f"<h2>Wrong readings at step {document['step']:,}</h2>"
    if not document["wrong"]:
        return [f"{title}<p>None.</p>"]
    try:
        tiles = [_tile(entry, pixels) for entry, pixels in _crops(run, document["wrong"])]
    except (LmimError, OSError) as error:
        return [title + warning(f"No crops to show: {error}")]
    intro = "<p>The ones that the model is surest of, with their confidence and the label.</p>"
    return [f'{title}{intro}<div class="sheet">{"".join(tiles)}</div>']


def _is_reading(entry: Any) -> bool:
    """Whether an entry of the file of wrong readings has what a tile shows."""
    texts = all(isinstance(entry[key], str) for key in ("set", "reading", "label"))
    index, probability = entry["index"], number(entry["probability"])
    return texts and isinstance(index, int) and index >= 0 and math.isfinite(probability)


def _crops(run: Run, wrong: list[dict[str, Any]]) -> list[tuple[dict[str, Any], np.ndarray]]:
    """The readings with the crops (H, W, 3) that the model saw."""
    config = run.config
    assert isinstance(config, FinetuneConfig)
    stores = {
        Path(path).resolve().name: open_records([path], config.loader.max_pixels, "--val")
        for path in config.val
    }
    shown = [entry for entry in wrong if entry["set"] in stores]
    if not shown or any(entry["index"] >= len(stores[entry["set"]]) for entry in shown):
        raise LmimError("the validation sets are others than those of the run")
    encoded = [stores[entry["set"]].images([entry["index"]])[0] for entry in shown]
    size = config.encoder.image_size
    views = DaliViews(
        batch_size=len(shown), threads=1, device=torch.device("cpu"), image_size=size, stage=Stage.PLAIN
    )
    try:
        (plain,) = views(encoded, None)
    except BrokenImages as broken:
        raise LmimError("an image of the validation sets cannot be decoded any more") from broken
    finally:
        views.close()
    return list(zip(shown, plain.numpy(), strict=True))


def _tile(entry: dict[str, Any], pixels: np.ndarray) -> str:
    reading, label = html.escape(visible(entry["reading"])), html.escape(visible(entry["label"]))
    sure = f'<span class="note">{entry["probability"]:.0%}</span>'
    caption = f'<span class="label">{reading or "(nothing)"}</span>{sure}'
    truth = f'<span class="note">label: {label}</span>'
    crop = crop_html(pixels, f"read as {entry['reading']}, labelled {entry['label']}")
    return f"<figure>{crop}<figcaption>{caption}{truth}</figcaption></figure>"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of validation.jsonl, one a step; an interrupted run may have left half of one.

    A score that is no number is NaN.
    """
    lines: dict[int, dict[str, Any]] = {}
    for text in read_text(path).split("\n") if path.is_file() else ():
        line = json_row(text)
        if line is None or not isinstance(line.get("sets"), dict):
            continue
        sets = {
            str(name): {key: number(value) for key, value in scores.items()}
            for name, scores in line["sets"].items()
            if isinstance(scores, dict)
        }
        accuracy = number(line.get("accuracy"))
        if sets and math.isfinite(accuracy):
            lines[line["step"]] = {"step": line["step"], "accuracy": accuracy, "sets": sets}
    return [lines[step] for step in sorted(lines)]
