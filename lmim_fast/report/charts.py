"""Curves of a run as inline SVG.

matplotlib draws them; the page's CSS variables colour them, so that they follow its light or dark scheme.
"""

from __future__ import annotations

import html
import io
import json
import re
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

_LOG_RANGE = 20.0  # largest over smallest value from which a log axis is offered
SMOOTH_FROM = 24  # points; fewer are drawn as they are
_HOVER_POINTS = 400  # what the read-out under the pointer can tell apart on a screen
COLOURS = ("a", "b", "c")  # of the page's palette, in the order that series take them
# matplotlib wants numbers for colours: these stand for the page's variables until the SVG is written.
_VARIABLES = {
    "ink": "#000001",
    "muted": "#000002",
    "grid": "#000003",
    "a": "#000004",
    "b": "#000005",
    "c": "#000006",
}


@dataclass(frozen=True)
class Series:
    """One line of a chart; `colour` is "a", "b" or "c" of the page's palette."""

    name: str
    values: np.ndarray
    colour: str = "a"


@dataclass(frozen=True)
class Points:
    """Marks beside the lines, where something else was measured at other steps.

    name:   in the legend and the read-out, which gives the newest value up to a step.
    steps:  (n,) increasing.
    values: (n,) float64; NaN: no mark.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Chart:
    """Series over the step, and perhaps points.

    `percent`: fractions shown as per cent; `from_zero`: the axis starts at 0.
    """

    title: str
    series: tuple[Series, ...]
    width: int = 620
    height: int = 210
    percent: bool = False
    from_zero: bool = False
    smooth: bool = True
    points: Points | None = None


def short(value: float, percent: bool = False) -> str:
    """A number in few characters: 0.00012 is 1.2e-4, 12345 is 12.35k; as a share, 0.0126 is 1.26 %."""
    if not np.isfinite(value):
        return "not finite"
    if percent:
        return f"{round(100 * value, 2):.3g} %"
    size = abs(value)
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred Gaussian average over about a fiftieth of the points (no lag); gaps stay gaps.

    Args:
        values: (n,) float64, NaN and infinities are gaps.
    Returns:
        (n,) float64, NaN exactly where `values` is not finite.
    """
    sigma = max(1.0, len(values) / 50)
    reach = min(int(3 * sigma), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    present = np.isfinite(values)
    size = len(values) + 2 * reach  # room for both ends: the transform is circular
    wave = np.fft.rfft(kernel, size)
    rows = np.stack((np.where(present, values, 0.0), present))
    total, weight = np.fft.irfft(np.fft.rfft(rows, size) * wave, size)[:, reach : reach + len(values)]
    return np.where(present, total / np.where(present, weight, 1.0), np.nan)


def chart_html(chart: Chart, steps: np.ndarray, key: str) -> str:
    """The chart as an HTML figure; with a linear / log switch when its values span a large range.

    Args:
        steps: (n,) increasing steps, as long as every series.
        key:   unique on the page: names the switch and the SVG's own ids.
    """
    drawn = [series for series in chart.series if np.isfinite(series.values).any()]
    title = f"<h3>{html.escape(chart.title)}</h3>"
    if not drawn:
        return f'<figure class="chart">{title}<p class="absent">No value was logged.</p></figure>'
    keys = [(one.name, one.colour) for one in drawn[:3]]
    if chart.points is not None:
        keys.append((chart.points.name, "ink"))
    legend = "".join(f'<span class="key {colour}">{html.escape(name)}</span>' for name, colour in keys)
    legend = legend if len(keys) > 1 else ""
    head = f"<figcaption>{title}{legend}</figcaption>"
    body = _plot(chart, drawn, steps, key, log=False)
    if not chart.percent and not chart.from_zero and _spans_decades(_values(chart, drawn)):
        log = _plot(chart, drawn, steps, f"{key}-log", log=True)
        switch = f'<input type="checkbox" id="{key}-scale" checked><label for="{key}-scale">log scale</label>'
        body = f'{switch}<div class="linear">{body}</div><div class="log">{log}</div>'
    return f'<figure class="chart">{head}{body}</figure>'


def _values(chart: Chart, drawn: list[Series]) -> np.ndarray:
    """All finite values of a chart."""
    values = [series.values for series in drawn] + ([] if chart.points is None else [chart.points.values])
    return np.concatenate([some[np.isfinite(some)] for some in values])


def _spans_decades(values: np.ndarray) -> bool:
    return bool(values.min() > 0 and values.max() / values.min() > _LOG_RANGE)


def _plot(chart: Chart, drawn: list[Series], steps: np.ndarray, key: str, log: bool) -> str:
    """The SVG and, for the read-out under the pointer, where its points are."""
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": key, "font.family": "sans-serif", "font.size": 12}
    ):
        figure = Figure(figsize=(chart.width / 72, chart.height / 72), dpi=72)
        canvas = FigureCanvasSVG(figure)
        box = (58 / chart.width, 26 / chart.height, 1 - 14 / chart.width, 1 - 8 / chart.height)
        axes = figure.add_axes((box[0], box[1], box[2] - box[0], box[3] - box[1]))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for place, series in enumerate(drawn):
            wide = len(drawn) > 1 and place == 0  # a total shows beside a part that it nearly equals
            _line(axes, steps, series, chart.smooth, width=3.0 if wide else 1.8)
        if chart.points is not None:
            _marks(axes, chart.points)
        _scales(axes, chart, drawn, log)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        hover = _hover(axes, figure, chart, drawn, steps)
    points = html.escape(json.dumps(hover, separators=(",", ":")))
    return f'<div class="plot" data-points="{points}">{_inline(buffer.getvalue(), key)}</div>'


def _line(axes: Axes, steps: np.ndarray, series: Series, smooth: bool, width: float) -> None:
    """Raw points as a faint line under the smoothed one; few points as they are, with dots."""
    values = np.where(np.isfinite(series.values), series.values, np.nan)
    colour = _VARIABLES[series.colour]
    if smooth and len(values) >= SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smoothed(values), color=colour, linewidth=width, solid_joinstyle="round")
    else:
        marker = "o" if len(values) < SMOOTH_FROM else ""
        axes.plot(steps, values, color=colour, linewidth=width, marker=marker, markersize=3.5)


def _marks(axes: Axes, points: Points) -> None:
    values = np.where(np.isfinite(points.values), points.values, np.nan)
    ink = _VARIABLES["ink"]
    axes.plot(points.steps, values, color=ink, linestyle="", marker="o", markersize=5.5, zorder=3)


def _scales(axes: Axes, chart: Chart, drawn: list[Series], log: bool) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_VARIABLES["muted"])
    axes.tick_params(colors=_VARIABLES["muted"], which="both", length=0, pad=6)
    axes.grid(axis="y", color=_VARIABLES["grid"], linewidth=1)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=chart.width // 110, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=max(3, chart.height // 45)))
    if not log and (chart.from_zero or chart.percent):
        top = float(_values(chart, drawn).max())
        least = 0.05 if chart.percent else 0.0  # a share near 0 must not look large
        axes.set_ylim(0, 1.12 * max(top, least) or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, chart.percent)))


def _hover(
    axes: Axes, figure: Figure, chart: Chart, drawn: list[Series], steps: np.ndarray
) -> dict[str, object]:
    """Points in shares of the SVG's width and height, with the text to show for each."""
    rows = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _HOVER_POINTS)).round().astype(int))
    size = figure.get_size_inches() * figure.dpi
    lines: list[dict[str, object]] = []
    for series in drawn:
        values = series.values[rows]
        safe = np.where(np.isfinite(values), values, axes.get_ylim()[0])
        places = axes.transData.transform(np.column_stack((steps[rows], safe))) / size
        ys = [
            round(1 - float(y), 4) if np.isfinite(v) else None
            for y, v in zip(places[:, 1], values, strict=True)
        ]
        texts = [short(float(value), chart.percent) for value in values]
        lines.append({"name": series.name, "colour": series.colour, "y": ys, "text": texts})
    if chart.points is not None:
        lines.append(_hover_points(chart.points, steps[rows], chart.percent))
    xs = [round(float(x), 4) for x in places[:, 0]]
    return {"x": xs, "step": [int(step) for step in steps[rows]], "lines": lines}


def _hover_points(points: Points, steps: np.ndarray, percent: bool) -> dict[str, object]:
    """The newest point up to each of the steps, as text without a place."""
    texts = []
    for place in np.searchsorted(points.steps, steps, side="right"):
        value = short(float(points.values[place - 1]), percent) if place else ""
        texts.append(f"{value} (step {points.steps[place - 1]:,})" if place else "not yet")
    return {"name": points.name, "colour": "ink", "y": [None] * len(texts), "text": texts}


def _inline(svg: str, key: str) -> str:
    """The `<svg>` element alone, sized by the page, its colours and ids the page's own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows these; no address is left in the page
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1),
        count=1,
    )
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", svg)
    for name, number in _VARIABLES.items():
        svg = svg.replace(number, f"var(--{name})")
    return re.sub(r"font: (\d+px) [^;\"]*", r"font-size: \1", svg)
