"""The page about an evaluation: scores, lengths, confused characters, and the worst readings as pictures."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np

from lmim_fast.data.decoding import decode
from lmim_fast.data.normalize import chinese, waics
from lmim_fast.data.store.records import RecordStore
from lmim_fast.evaluation.confusions import align, confusions
from lmim_fast.evaluation.layouts import DATASETS
from lmim_fast.evaluation.metrics import BUCKETS, Normalize, Score
from lmim_fast.evaluation.published import Published
from lmim_fast.evaluation.results import LABELS_AS_FOUND, Result, averages, in_percent
from lmim_fast.report.images import crop_html
from lmim_fast.report.page import definitions, page, warning

_CONFUSIONS_SHOWN = 30
_BROKEN_NAMED = 20
_CROP_LIMIT = (96, 384)  # height and width of an error's picture at most: crops of pages would fill the file


def evaluation_html(
    results: Sequence[Result],
    stores: Mapping[str, RecordStore],
    published: Sequence[Published],
    facts: Mapping[str, str],
    errors: int,
) -> str:
    """The whole document.

    Args:
        results:   of the test sets, in the order of the table.
        stores:    name of a set -> its open records, for the pictures.
        published: rows to put beside ours; empty without a comparison.
        facts:     what else the reader has to know: model, search, precision.
        errors:    wrong readings shown as pictures at most.
    """
    total = sum((result.score for result in results), Score())
    tiles = [
        ("word accuracy", in_percent(total.accuracy), f"{total.correct:,} of {total.images:,} images"),
        ("exact, with case and symbols", in_percent(total.exact_accuracy), f"{total.exact:,} images"),
        ("1-NED", in_percent(total.one_minus_ned), "mean over images"),
        ("test sets", str(len(results)), ""),
    ]
    sections = [
        "<header><h1>Evaluation</h1></header>",
        definitions("tiles", tiles),
        definitions("facts", [(name, value, "") for name, value in facts.items()]),
        f"<h2>Test sets</h2>{_explanation(results)}{_sets_table(results)}{_averages_table(results)}",
        *_damages(results, stores),
        *_published(results, published),
        f"<h2>By length of the label</h2>{_lengths_table(results, total)}",
        f"<h2>Confused characters</h2>{_confusions(results)}",
        f"<h2>Worst errors</h2>{_worst(results, stores, errors)}",
    ]
    return page("Evaluation", "\n".join(sections))


def _explanation(results: Sequence[Result]) -> str:
    rules = []
    if any(result.test_set.normalize is waics for result in results):
        rules.append("Accuracy ignores case and symbols (WAICS: letters and digits, lower-case, all equal).")
    if any(result.test_set.normalize is chinese for result in results):
        rules.append(
            "Chinese: all characters equal after NFKC, traditional to simplified, lower case, no spaces."
        )
    rules.append("1-NED is measured on the same normalised strings; exact compares every character as it is.")
    rules.append(f"Splits are recognised by name and number of records; {LABELS_AS_FOUND}.")
    return f"<p>{html.escape(' '.join(rules))}</p>"


def _sets_table(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        score, test_set = result.score, result.test_set
        rows.append(
            [
                test_set.name,
                test_set.benchmark,
                result.split or "-",
                f"{score.images:,}",
                in_percent(score.accuracy),
                in_percent(score.exact_accuracy),
                in_percent(score.one_minus_ned),
                f"{score.broken:,}",
                f"{score.unlabelled:,}",
            ]
        )
    head = ["set", "benchmark", "split", "images", "accuracy", "exact", "1-NED", "broken", "no label"]
    return _table(head, rows, texts=3)


def _averages_table(results: Sequence[Result]) -> str:
    rows = [
        [row.title, f"{row.images:,}", in_percent(row.average), in_percent(row.weighted)]
        for row in averages(results)
    ]
    return _table(["average of", "images", "Avg (over sets)", "W-Avg (over images)"], rows) if rows else ""


def _damages(results: Sequence[Result], stores: Mapping[str, RecordStore]) -> list[str]:
    """Broken images by name: they count as wrong."""
    notes = []
    for result in results:
        broken = list(result.readings.broken.items())
        if broken:
            name = result.test_set.name
            listed = ", ".join(
                f"{stores[name].locate(index)[1]} ({reason})" for index, reason in broken[:_BROKEN_NAMED]
            )
            more = f" and {len(broken) - _BROKEN_NAMED} more" if len(broken) > _BROKEN_NAMED else ""
            count = _count(len(broken), "image")
            notes.append(warning(f"{name}: {count} cannot be decoded, counted as wrong: {listed}{more}"))
        if result.score.unlabelled:
            count = _count(result.score.unlabelled, "record")
            notes.append(warning(f"{result.test_set.name}: {count} without a label, not counted"))
    return notes


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def _published(results: Sequence[Result], published: Sequence[Published]) -> list[str]:
    """Ours above the published rows, one table a benchmark."""
    sections = []
    for benchmark, datasets in DATASETS.items():
        rows = [row for row in published if row.benchmark == benchmark]
        if not rows:
            continue
        lines = []
        for average in averages(results):
            ours = {
                result.test_set.dataset: result.score.accuracy
                for result in results
                if result.test_set.name in average.names and result.test_set.benchmark == benchmark
            }
            if ours:
                values = [in_percent(ours.get(name)) for name in datasets]
                title = f"{average.title}; labels as found"
                lines.append(
                    ["this model", title, *values, in_percent(average.average), in_percent(average.weighted)]
                )
        if not lines:  # a single set has no average
            ours = {
                result.test_set.dataset: result.score.accuracy
                for result in results
                if result.test_set.benchmark == benchmark
            }
            values = [in_percent(ours.get(name)) for name in datasets]
            lines.append(["this model", "one set; labels as found", *values, "-", "-"])
        for row in rows:
            values = [in_percent(row.sets.get(name)) for name in datasets]
            labels = f"published: {row.labels}" + (" (ablation study)" if row.ablation else "")
            lines.append([row.method, labels, *values, in_percent(row.average), in_percent(row.weighted)])
        head = ["method", "source and label set", *datasets, "Avg", "W-Avg"]
        sections.append(f"<h2>Published results: {html.escape(benchmark)}</h2>{_table(head, lines, texts=2)}")
    return sections


def _lengths_table(results: Sequence[Result], total: Score) -> str:
    head = ["length", *(result.test_set.name for result in results), "all", "images"]
    rows = []
    for name in BUCKETS:
        if name in total.lengths:
            parts = [result.score.lengths.get(name) for result in results]
            values = [in_percent(part.accuracy if part else None) for part in parts]
            tally = total.lengths[name]
            rows.append([name, *values, in_percent(tally.accuracy), f"{tally.images:,}"])
    return f"<p>Characters of the normalised label.</p>{_table(head, rows)}"


def _confusions(results: Sequence[Result]) -> str:
    counts: Counter[tuple[str, str]] = Counter()
    for result in results:
        counts += confusions(_normalized(result))
    if not counts:
        return "<p>None: every reading equals its label.</p>"
    kinds = {True: "substitution", False: "insertion"}
    rows = []
    # Counts first, then the characters: the same table for the same readings.
    for (label, reading), count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        kind = "deletion" if not reading else kinds[bool(label)]
        rows.append([label or "nothing", reading or "nothing", kind, f"{count:,}"])
    shown = rows[:_CONFUSIONS_SHOWN]
    intro = (
        f"<p>The edits that turn a label into its reading: the {len(shown)} most frequent of {len(rows)}, "
        "on normalised strings of images that can be decoded.</p>"
    )
    return intro + _table(["label", "read as", "edit", "count"], shown, texts=3)


def _normalized(result: Result) -> Iterable[tuple[str, str]]:
    readings, normalize = result.readings, result.test_set.normalize
    for index, label, text in zip(readings.indices.tolist(), readings.labels, readings.strings, strict=True):
        if index not in readings.broken:
            yield normalize(label), normalize(text)


def _worst(results: Sequence[Result], stores: Mapping[str, RecordStore], count: int) -> str:
    """Wrong readings, those that the model was surest of first."""
    wrong: list[tuple[float, int, int]] = []  # minus probability, result, row
    for number, result in enumerate(results):
        broken = result.readings.broken
        for row in np.flatnonzero(~result.readings.correct).tolist():
            if int(result.readings.indices[row]) not in broken:
                wrong.append((-float(result.readings.probabilities[row]), number, row))
    if not wrong:
        return "<p>No decodable image is read wrongly.</p>"
    wrong.sort()
    shown = wrong[:count]
    tiles = [_tile(results[number], row, stores[results[number].test_set.name]) for _, number, row in shown]
    intro = (
        f"<p>{len(shown)} of {len(wrong):,} wrong readings, the surest first. Characters that differ are"
        " marked: those of the reading, and under it those of the label.</p>"
    )
    return f'{intro}<div class="sheet errors">{"".join(tiles)}</div>'


def _tile(result: Result, row: int, store: RecordStore) -> str:
    readings, normalize = result.readings, result.test_set.normalize
    index, label, text = int(readings.indices[row]), readings.labels[row], readings.strings[row]
    read, expected = _marked(align(label, text, normalize), normalize)
    image = crop_html(_pixels(store.images([index])[0]), f"{label} read as {text}")
    note = html.escape(f"{result.test_set.name} #{index}, p {readings.probabilities[row]:.2f}")
    return (
        f'<figure>{image}<figcaption><span class="label">{read}</span><span class="note">{note}</span>'
        f'</figcaption><figcaption><span class="label">{expected}</span><span class="note">label</span>'
        "</figcaption></figure>"
    )


def _marked(pairs: list[tuple[str, str]], normalize: Normalize) -> tuple[str, str]:
    """Reading and label as HTML; an edit that normalisation hides (case, symbols) is not marked."""
    read, expected = "", ""
    for label, reading in pairs:
        differs = normalize(label) != normalize(reading)
        read += _character(reading, differs)
        expected += _character(label, differs)
    return read or '<span class="absent">nothing</span>', expected


def _character(character: str, differs: bool) -> str:
    text = html.escape(character)
    return f"<mark>{text}</mark>" if differs and character else text


def _pixels(encoded: bytes) -> np.ndarray:
    """A crop as (H, W, 3) uint8 RGB, shrunk to fit `_CROP_LIMIT`; EXIF rotation ignored, as in training."""
    pixels = decode(np.frombuffer(encoded, np.uint8))
    if pixels is None:  # DALI decodes some that OpenCV does not
        return np.full((32, 128, 3), 118, np.uint8)
    height, width = pixels.shape[:2]
    scale = min(1.0, _CROP_LIMIT[0] / height, _CROP_LIMIT[1] / width)
    if scale < 1.0:
        size = (max(1, round(scale * width)), max(1, round(scale * height)))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table of escaped cells; the first `texts` columns are words, the others figures."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="text"' if place < texts else "" for place in range(len(cells))]
        return "".join(
            f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)
        )

    lines = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table class="scores"><tr>{line(head, "th")}</tr>{lines}</table></div>'
