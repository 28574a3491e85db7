"""`lmim report`: one HTML page about a run: figures, curves, views, readings and attention maps."""

from __future__ import annotations

import html
import itertools
import json
from datetime import timedelta
from pathlib import Path

import numpy as np

from lmim_fast import durable
from lmim_fast.config import FinetuneConfig, ReportConfig
from lmim_fast.errors import DataError, LmimError, UsageError
from lmim_fast.report.charts import COLOURS, SMOOTH_FROM, Chart, Points, Series, chart_html, short
from lmim_fast.report.page import definitions, folded, page, warning
from lmim_fast.report.run import Run, read_metrics, read_run
from lmim_fast.train.optim import peak_learning_rate
from lmim_fast.train.side_files import HELD_OUT_FILE

_TABLE_ROWS = 25


def write_report(config: ReportConfig) -> Path:
    """Write the page about the run in `config.run`.

    Data that is gone or a run without checkpoint cost their own sections only, which say so.

    Returns:
        the HTML file's path; it is replaced whole or not at all.
    Raises:
        UsageError: no such run folder, not a run folder, or an output path that cannot be written.
        LmimError: the run's files cannot be read or hold no step.
    """
    run = read_run(Path(config.run))
    target = Path(config.output) if config.output else run.folder / "report.html"
    sections = [
        _head(run),
        f"<h2>Curves</h2>{_curves(run)}",
        *_readings(run),
        *_pictures(run, config),
        f"<h2>Details</h2>{_details(run)}",
    ]
    _write(target, page(f"{run.name} - {run.task.title} report", "\n".join(sections)))
    return target


def _head(run: Run) -> str:
    """Name, status, and the figures a reader looks for first."""
    badge = '<span class="badge {}">{}</span>'.format(*_status(run))
    title = (
        f'<header><h1>{html.escape(run.name)}</h1><span class="badge">{run.task.title}</span>{badge}</header>'
    )
    metrics = run.metrics
    remarks = ""
    if metrics.malformed:
        lines = "line" if metrics.malformed == 1 else "lines"
        remarks += warning(f"Skipped {metrics.malformed} malformed {lines} of metrics.jsonl.")
    lost = int((~np.isfinite(metrics.column("loss"))).sum())
    if lost:
        remarks += warning(
            f"The loss is missing or not finite in {lost} of {len(metrics.steps)} logged lines."
        )
    skipped = metrics.finite("skipped_steps")
    if len(skipped) and skipped[-1] > 0:
        remarks += warning(f"Steps without an update (loss or gradient not finite): {skipped[-1]:.0f}.")
    return title + definitions("tiles", _figures(run)) + definitions("facts", _facts(run)) + remarks


def _status(run: Run) -> tuple[str, str]:
    """CSS class and text of the status badge."""
    if run.total is None:
        return "", f"{run.done:,} steps"
    if run.done >= run.total:
        return "good", f"finished, {run.done:,} steps"
    return "warn", f"stopped at step {run.done:,} of {run.total:,}"


def _figures(run: Run) -> list[tuple[str, str, str]]:
    metrics = run.metrics

    def change(title: str, name: str) -> tuple[str, str, str]:
        values = metrics.finite(name)
        if not len(values):
            return title, "not logged", ""
        return title, short(float(values[-1])), f"from {short(float(values[0]))}"

    tiles = [change(title, name) for name, title in run.task.loss_titles.items()]
    rate, wait = metrics.finite("images_per_second"), metrics.finite("data_wait_fraction")
    bad, epochs = metrics.finite("bad_records"), metrics.finite("epoch")
    seconds = metrics.finite("elapsed_seconds")
    duration = _duration(seconds[-1]) if len(seconds) else ""
    absent = "not logged"
    tiles += [
        ("images/s", short(float(np.median(rate))) if len(rate) else absent, "median"),
        ("waiting for data", short(float(wait.mean()), percent=True) if len(wait) else absent, "of the time"),
        (
            "broken records",
            short(float(bad.max()))
            if len(bad) and bad.max() > 1e15
            else f"{int(bad.max()):,}"
            if len(bad)
            else absent,
            "" if not len(bad) or not bad.max() else "substituted",
        ),
        ("epochs", f"{epochs[-1]:.4g}" if len(epochs) else absent, duration),
    ]
    return tiles


def _duration(seconds: float) -> str:
    return f"in {timedelta(seconds=round(seconds))}" if 0 <= seconds < 1e9 else ""


def _facts(run: Run) -> list[tuple[str, str, str]]:
    config, model = run.config, run.config.encoder
    passes = f" in {config.accumulation} passes" if config.accumulation > 1 else ""
    facts = [
        ("model", f"{config.preset}: {model.depth} blocks of {model.width}, {model.heads} heads", ""),
        ("batch", f"{config.batch_size}{passes}", ""),
        ("peak learning rate", short(peak_learning_rate(config)), ""),
        ("precision", config.precision, ""),
        *((name, value, "") for name, value in run.task.facts().items()),
        ("seed", str(config.seed), ""),
    ]
    memory = run.metrics.finite("memory_bytes")
    if len(memory):
        facts.append(("peak memory", f"{memory.max() / 1e9:.2f} GB", ""))
    facts.append(("data", ", ".join(config.data), ""))
    versions = run.document.get("versions")
    if isinstance(versions, dict):
        facts.append(("versions", ", ".join(f"{name} {value}" for name, value in versions.items()), ""))
    return facts


def _curves(run: Run) -> str:
    metrics = run.metrics
    losses = [
        Series(title.removesuffix(" loss"), metrics.column(name), colour)
        for (name, title), colour in zip(run.task.loss_titles.items(), itertools.cycle(COLOURS), strict=False)
    ]
    held_out, remark = _held_out(run)
    rate = Series("images/s", metrics.column("images_per_second"), "c")
    wait = Series("share", metrics.column("data_wait_fraction"), "b")
    charts = [
        Chart("Loss", tuple(losses), width=1280, height=330, points=held_out),
        Chart("Learning rate", (Series("rate", metrics.column("lr")),), from_zero=True, smooth=False),
        Chart("Gradient norm", (Series("norm", metrics.column("grad_norm")),)),
        Chart("Images per second", (rate,), from_zero=True),
        Chart("Share of the time spent waiting for data", (wait,), percent=True),
    ]
    intro = "Point at a chart to read its values."
    if len(metrics.steps) >= SMOOTH_FROM:
        intro = f"Faint lines are as logged, strong ones smoothed. {intro}"
    if metrics.replayed:
        intro += (
            f" The run was resumed: of {metrics.replayed} lines that it logged again, the later ones count."
        )
    drawn = [chart_html(chart, metrics.steps, f"chart{place}") for place, chart in enumerate(charts)]
    return f'{remark}<p>{intro}</p><div class="charts">{"".join(drawn)}</div>'


def _held_out(run: Run) -> tuple[Points | None, str]:
    """The loss of held-out crops, and a remark if the run's file of it cannot be used."""
    path = run.folder / HELD_OUT_FILE
    if not path.is_file():
        return None, ""
    try:
        measured = read_metrics(path)
    except LmimError as error:
        return None, warning(f"No held-out loss: {error}")
    values = measured.column(next(iter(run.task.loss_titles)))
    return Points("held-out", measured.steps, values), ""


def _pictures(run: Run, config: ReportConfig) -> list[str]:
    """The sections that need the data, and the one that needs the model too; or why there are none."""
    views, maps = "<h2>Views</h2>", f"<h2>{run.task.maps_title}</h2>"
    try:
        # Imported here: a machine that lacks DALI still gets the rest of the page.
        from lmim_fast.report.views import load_crops, sheet_html

        crops = load_crops(run, max(config.samples, config.maps))
    except (LmimError, ImportError, OSError) as error:
        moved = "; relative paths hold from the folder the run was started in"
        return [
            views
            + warning(
                f"No crops to show: {error}{moved if isinstance(error, DataError | UsageError) else ''}"
            )
        ]
    sections = [views + sheet_html(crops, config.samples)]
    if config.maps:
        try:
            from lmim_fast.report.maps import compute_maps, maps_html
            from lmim_fast.train.export import load_model

            model, _ = load_model(run.folder)
        except (LmimError, ImportError, OSError) as error:
            return [*sections, maps + warning(f"No attention maps: {error}")]
        drawn = compute_maps(run.task, model, crops, config.maps)
        sections.append(maps + maps_html(drawn, crops, run.config.encoder.patch_size))
    return sections


def _readings(run: Run) -> list[str]:
    """Validation and wrong readings of a recogniser's run."""
    if not isinstance(run.config, FinetuneConfig):
        return []
    try:
        from lmim_fast.report.readings import validation_html
    except ImportError as error:
        return [warning(f"No readings: {error}")]
    return validation_html(run)


def _details(run: Run) -> str:
    metrics = run.metrics
    names = [name for name in metrics.columns if np.isfinite(metrics.columns[name]).any()]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["step", *names])
    rows = []
    for row in range(max(0, len(metrics.steps) - _TABLE_ROWS), len(metrics.steps)):
        cells = "".join(f"<td>{short(float(metrics.columns[name][row]))}</td>" for name in names)
        rows.append(f"<tr><td>{metrics.steps[row]}</td>{cells}</tr>")
    table = f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    document = html.escape(json.dumps(run.document, indent=2, ensure_ascii=False))
    title = f"The last {len(rows)} of {len(metrics.steps)} logged lines"
    return folded(title, table) + folded("config.json", f"<pre>{document}</pre>")


def _write(target: Path, text: str) -> None:
    """Write beside the target, then rename."""
    if target.is_dir():
        raise UsageError(f"the report's output {target} is a folder; name a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.write_file(target, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise UsageError(f"cannot write the report to {target}: {error.strerror}") from error
