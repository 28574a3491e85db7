"""Histograms of `lmim data stats` as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from lmim_fast.data.tools.record_stats import Stats

_BINS = 60
_TOP = 60  # characters drawn
_SHOWN = 99.5  # percentile at which the axis ends; what lies beyond is in the title
_COLOUR, _EDGE = "#3b6ea5", "#24476b"


def histograms(counted: Stats) -> dict[str, bytes]:
    """File name -> PNG; what there is nothing of has none."""
    sizes = (
        ("heights.png", counted.heights, "height in pixels", "records"),
        ("widths.png", counted.widths, "width in pixels", "records"),
        ("aspect_ratio.png", counted.aspect_ratios, "width / height", "records"),
        ("label_length.png", counted.label_lengths, "characters of a label", "labels"),
    )
    drawn = {name: _histogram(values, x, y) for name, values, x, y in sizes if len(values)}
    if counted.characters:
        drawn["characters.png"] = _characters(counted.characters)
    return drawn


def _histogram(values: NDArray[Any], x: str, y: str) -> bytes:
    end = float(np.percentile(values, _SHOWN))
    figure, axes = _figure(7.0)
    whole = np.issubdtype(values.dtype, np.integer)
    if whole:  # bins of whole numbers, so that none is higher by chance
        low, high = int(values.min()), int(end)
        step = max(1, -(-(high - low + 1) // _BINS))
        edges = np.arange(low, high + step + 1, step) - 0.5
    else:
        start = float(values.min())
        edges = np.linspace(start, max(end, start + 1e-6), _BINS + 1)
    beyond = int(np.count_nonzero(values > edges[-1]))
    axes.hist(values[values <= edges[-1]], bins=edges.tolist(), color=_COLOUR, edgecolor=_EDGE, linewidth=0.3)
    median = float(np.median(values))
    axes.axvline(median, color="#b3432b", linewidth=1.2)
    title = f"{len(values):,} {y}, median {median:.4g} (red)"
    if beyond:
        last = f"{int(edges[-1])}" if whole else f"{edges[-1]:.4g}"
        title += f"; {beyond:,} above {last}, up to {values.max():.4g}, are not shown"
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _png(figure)


def _characters(characters: dict[str, int]) -> bytes:
    """The most frequent characters, on a logarithmic axis: they differ by orders of magnitude."""
    top = list(characters.items())[:_TOP]
    figure, axes = _figure(max(4.0, 1.5 + 0.17 * len(top)))
    axes.bar(range(len(top)), [count for _, count in top], color=_COLOUR, edgecolor=_EDGE, linewidth=0.3)
    names = [_name(character) for character, _ in top]
    axes.set_xticks(range(len(top)), names, fontsize=9)
    for tick, name in zip(axes.get_xticklabels(), names, strict=True):
        tick.set_parse_math(False)
        tick.set_rotation(90 if len(name) > 1 else 0)
    axes.set_xlim(-0.7, len(top) - 0.3)
    axes.set_yscale("log")
    axes.set_ylim(bottom=10 ** np.floor(np.log10(0.9 * top[-1][1])))  # so that no bar is without height
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    left = f", the {len(top)} most frequent" if len(top) < len(characters) else ""
    axes.set_title(f"{len(characters):,} characters in labels{left}", fontsize=9, loc="left")
    axes.set_ylabel("occurrences (logarithmic)")
    return _png(figure)


def _name(character: str) -> str:
    """The character if it has a shape and the drawing's font has that, else its code point."""
    if character.isprintable() and not character.isspace() and ord(character) in _glyphs():
        return character
    return "space" if character == " " else f"U+{ord(character):04X}"


def _glyphs() -> Mapping[int, int]:
    """Code points of the font that figures are drawn with."""
    path = font_manager.findfont(font_manager.FontProperties())
    return font_manager.get_font(path).get_charmap()


def _figure(width: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, 3.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()
