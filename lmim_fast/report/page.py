"""The report's page: its frame, style and read-out script. Nothing in it, or added to it, reaches outside."""

from __future__ import annotations

import html

# The browser itself refuses any request, should a string from the user's files ever carry one.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f27; --muted: #667085;
  --grid: #e6e8ec; --edge: #e1e4e9; --a: #2563c9; --b: #c2570c; --c: #0e8a6d;
  --good: #0b7a4b; --good-back: #dcf5e8; --warn: #8a4e00; --warn-back: #fdf0d5; }
@media (prefers-color-scheme: dark) { :root { --page: #111419; --card: #191d24; --ink: #e7eaf0;
  --muted: #98a2b3; --grid: #2a303a; --edge: #2a303a; --a: #6ea8ff; --b: #ff9d5c; --c: #3fd0a4;
  --good: #6fe0a8; --good-back: #12382a; --warn: #ffc766; --warn-back: #3d2f10; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system,
  "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 10px; }
h3 { font-size: 15px; margin: 0; font-weight: 600; }
h4 { font-size: 13px; margin: 0; font-weight: 600; }
p { margin: 0 0 14px; color: var(--muted); max-width: 120ch; }
figure { margin: 0; min-width: 0; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 12px; }
.badge { font-size: 13px; font-weight: 600; padding: 3px 11px; border-radius: 99px; background: var(--grid); }
.badge.good { color: var(--good); background: var(--good-back); }
.badge.warn, .warning { color: var(--warn); background: var(--warn-back); }
.warning { padding: 9px 14px; border-radius: 8px; max-width: none; overflow-wrap: anywhere; margin: 12px 0; }
.note { color: var(--muted); font-size: 13px; font-weight: 400; }
.absent { font-style: italic; color: var(--muted); }
.tiles div, .chart, article, details { background: var(--card); border: 1px solid var(--edge);
  border-radius: 12px; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 20px 0 0; }
.tiles div { padding: 13px 16px; }
.tiles dt, .facts dt { color: var(--muted); font-size: 13px; }
.tiles dd { margin: 1px 0 0; font-size: 22px; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: 13px; font-weight: 400; color: var(--muted); }
.facts { display: flex; flex-wrap: wrap; gap: 10px 36px; margin: 16px 0 0; padding: 0 17px; }
.facts dd { margin: 0; font-size: 14px; overflow-wrap: anywhere; }

.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
.charts .chart:first-child { grid-column: 1 / -1; }
.chart { padding: 14px 16px 10px; position: relative; }
.chart > figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 16px;
  margin-bottom: 8px; padding-right: 90px; }
.key { font-size: 13px; }
.key::before { content: ""; display: inline-block; width: 16px; height: 3px; border-radius: 2px;
  margin-right: 7px; vertical-align: middle; }
.key.a::before { background: var(--a); }
.key.b::before { background: var(--b); }
.key.c::before { background: var(--c); }
.key.ink::before { background: var(--ink); width: 8px; height: 8px; border-radius: 99px; }
.chart > input { position: absolute; opacity: 0; }
.chart > label { position: absolute; right: 16px; top: 14px; font-size: 13px; padding: 1px 10px;
  border: 1px solid var(--edge); border-radius: 99px; cursor: pointer; color: var(--muted); }
.chart > input:checked + label { color: var(--a); border-color: currentColor; }
.chart > input:focus-visible + label { outline: 2px solid var(--a); outline-offset: 2px; }
.chart > input:checked ~ .linear, .chart > input:not(:checked) ~ .log { display: none; }
.plot { position: relative; }
.plot svg { display: block; width: 100%; height: auto; font-family: inherit; }
.cursor { position: absolute; top: 2%; bottom: 9%; width: 1px; background: var(--muted); opacity: .6;
  pointer-events: none; }
.dot { position: absolute; width: 9px; height: 9px; margin: -4.5px; border-radius: 50%;
  border: 2px solid var(--card); pointer-events: none; }
.tip { position: absolute; top: 4px; z-index: 1; background: var(--card); border: 1px solid var(--edge);
  border-radius: 8px; padding: 5px 10px; font-size: 13px; line-height: 1.45; white-space: nowrap;
  pointer-events: none; box-shadow: 0 3px 12px #0002; font-variant-numeric: tabular-nums; }

.crop { image-rendering: pixelated; display: block; width: 256px; height: auto; max-width: 100%;
  border-radius: 3px; }
.sheet, .cells { display: grid; grid-template-columns: repeat(auto-fill, 256px); gap: 20px 18px; }
.sheet { justify-content: space-between; }
.sheet .crop + .crop, .stack + .stack { margin-top: 3px; }
.sheet figcaption { display: flex; justify-content: space-between; gap: 10px; align-items: baseline;
  margin-top: 4px; font-size: 14px; }
.label { font-weight: 600; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.label.absent { font-weight: 400; }
article { padding: 14px 18px 18px; margin: 0 0 14px; }
article h3 { display: flex; gap: 10px; align-items: baseline; }
.row { display: grid; grid-template-columns: minmax(150px, 1fr) 1078px; gap: 18px; margin-top: 12px; }
.row .note { display: block; }
.cells { gap: 12px 18px; }
.cells figcaption { font-size: 13px; color: var(--muted); margin-top: 3px; }
.peak { float: right; font-variant-numeric: tabular-nums; }
.stack { position: relative; width: 256px; max-width: 100%; }
.dimmed { filter: grayscale(1) brightness(.72); }
.heat { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 3px; }
.box { position: absolute; outline: 2px solid #ff2d55; box-shadow: 0 0 0 3.5px #fffc; }

details { padding: 10px 16px; margin: 0 0 10px; }
summary { cursor: pointer; font-weight: 600; }
.wide { overflow-x: auto; margin-top: 10px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
.scores { margin-bottom: 14px; }
.scores .text { text-align: left; }
.errors .crop { width: auto; height: 96px; object-fit: contain; object-position: left; }
mark { color: var(--warn); background: var(--warn-back); border-radius: 3px; padding: 0 1px; }
pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-x: auto;
  margin: 10px 0 0; }
@media (max-width: 1320px) { .row { grid-template-columns: minmax(0, 1fr); gap: 8px; } }
@media (max-width: 820px) { main { padding: 18px 12px; }
  .charts { grid-template-columns: minmax(0, 1fr); }
  .charts .chart:first-child .plot { overflow-x: auto; }
  .charts .chart:first-child svg { min-width: 720px; } }
"""

# Reads only what Python has put in data-points: places in shares of the picture, and the text to show.
_SCRIPT = """
for (const plot of document.querySelectorAll(".plot")) {
  const points = JSON.parse(plot.dataset.points), svg = plot.querySelector("svg"), marks = [];
  const mark = (kind) => {
    const element = document.createElement("div");
    element.className = kind;
    plot.append(element);
    marks.push(element);
    return element;
  };
  const clear = () => { while (marks.length) marks.pop().remove(); };
  plot.addEventListener("pointerleave", clear);
  plot.addEventListener("pointermove", (event) => {
    clear();
    const frame = svg.getBoundingClientRect(), at = (event.clientX - frame.left) / frame.width;
    let i = 0;
    points.x.forEach((x, k) => { if (Math.abs(x - at) < Math.abs(points.x[i] - at)) i = k; });
    const left = points.x[i] * frame.width;
    mark("cursor").style.left = left + "px";
    const tip = mark("tip");
    tip.append("step " + points.step[i].toLocaleString("en"));
    for (const line of points.lines) {
      const colour = "var(--" + line.colour + ")", row = document.createElement("div");
      row.textContent = line.name + "  " + line.text[i];
      row.style.color = colour;
      tip.append(row);
      if (line.y[i] === null) continue;
      const dot = mark("dot");
      dot.style.left = left + "px";
      dot.style.top = line.y[i] * frame.height + "px";
      dot.style.background = colour;
    }
    const turn = left + 14 + tip.offsetWidth > frame.width;
    tip.style.left = (turn ? left - 14 - tip.offsetWidth : left + 14) + "px";
  });
}
"""


def page(title: str, body: str) -> str:
    """The whole document: `title` is escaped here, `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n'
        f"<body><main>{body}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def definitions(kind: str, entries: list[tuple[str, str, str]]) -> str:
    """A grid of (name, value, remark), each escaped here; an empty remark is left out."""
    cells = []
    for name, value, remark in entries:
        small = f"<small>{html.escape(remark)}</small>" if remark else ""
        cells.append(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}{small}</dd></div>")
    return f'<dl class="{kind}">{"".join(cells)}</dl>'


def warning(text: str) -> str:
    """A highlighted remark, escaped here."""
    return f'<p class="warning">{html.escape(text)}</p>'


def folded(title: str, body: str) -> str:
    """A closed section; `body` is HTML."""
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"
