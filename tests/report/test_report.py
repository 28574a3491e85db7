"""The report: one page that holds the whole run, asks for nothing outside, and fails clearly."""

import html
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import LABELS, SCRIPT, line, make_run, write_crops

from lmim_fast.config import OptimConfig, ReportConfig, preset
from lmim_fast.data.order import SampleOrder
from lmim_fast.errors import LmimError, UsageError
from lmim_fast.report.run import read_metrics, read_run
from lmim_fast.report.write import write_report

# The crops lack a label on purpose, which the record store remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:.*some lack image or label:UserWarning")


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_crops(tmp_path_factory.mktemp("data") / "crops")


def report(run: Path, **options: Any) -> str:
    return write_report(ReportConfig(run=str(run), **options)).read_text(encoding="utf-8")


def assert_self_contained(page: str) -> None:
    assert "http://" not in page
    assert "https://" not in page
    links = re.findall(r'(?:src|href|srcset|data|action)="([^"]*)"', page)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def figure(page: str, name: str) -> str:
    """The value beside a figure's or fact's name, remark included."""
    found = re.search(rf"<dt>{name}</dt><dd>(.*?)</dd>", page)
    assert found, name
    return html.unescape(re.sub(r"<[^>]*>", " ", found[1]))


def test_page_holds_the_runs_figures_and_asks_for_nothing_outside(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "my <b>run", optim=OptimConfig(lr=0.00025), batch_size=64))
    assert_self_contained(page)
    assert "<h1>my &lt;b&gt;run</h1>" in page
    assert "MAE pre-training" in page
    assert "finished, 40 steps" in page
    assert figure(page, "loss") == "0.05 from 2 "
    assert figure(page, "images/s") == "120.5 median "
    assert figure(page, "waiting for data") == "2 % of the time "
    assert figure(page, "broken records") == "3 substituted "
    assert figure(page, "epochs") == "20 in 0:04:40 "
    assert figure(page, "peak learning rate") == "2.5e-4"
    assert figure(page, "batch") == "64"
    assert figure(page, "versions") == "torch 2.99<b>"
    for title in ("Loss", "Learning rate", "Gradient norm", "Images per second", "waiting for data"):
        assert re.search(rf"<h3>[^<]*{title}</h3>", page), title
    table = page[page.index("<table>") : page.index("</table>")]
    assert table.count("<tr>") == 1 + 25
    assert "<td>40</td>" in table
    assert "&quot;objective&quot;: &quot;mae&quot;" in page


def test_lmim_page_draws_the_loss_and_its_two_parts(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", objective="lmim", teacher="random"))
    assert figure(page, "reconstruction loss") == "0.0375 from 1.5 "
    assert figure(page, "cls alignment loss") == "0.0125 from 0.5 "
    assert figure(page, "teacher") == "random"
    assert "cls alignment</span>" in page


@pytest.mark.parametrize(
    ("steps", "epochs", "status"),
    [
        (400, 1.0, "stopped at step 40 of 400"),
        (None, 8.0, "finished, 40"),
        (None, 10.0, "stopped at step 40 of 50"),
    ],
)
def test_status_says_how_far_the_run_came(
    tmp_path: Path, steps: int | None, epochs: float, status: str
) -> None:
    assert status in report(make_run(tmp_path / "run", steps=steps, epochs=epochs, batch_size=16))


def test_a_checkpoint_newer_than_the_last_line_counts_as_done(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=60)
    for name in ("step-00000060", "step-00000070.tmp"):
        (run / "checkpoints" / name).mkdir(parents=True)
    assert "finished, 60 steps" in report(run, maps=0)


def test_data_that_is_gone_costs_only_its_section(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", data=("gone/a<i>way",)))
    assert "No crops to show" in page
    assert "gone/a&lt;i&gt;way" in page
    assert "relative paths hold from the folder" in page
    assert "<i>way" not in page
    assert page.count("<svg") >= 5
    assert "config.json</summary>" in page
    assert 'class="crop' not in page


def test_views_show_every_label_escaped_and_name_the_broken_record(tmp_path: Path, crops: Path) -> None:
    page = report(make_run(tmp_path / "run", data=(str(crops),)), samples=8)
    assert_self_contained(page)
    assert SCRIPT not in page
    shown = {html.unescape(text) for text in re.findall(r'<span class="label[^>]*>([^<]*)<', page)}
    substitute = {text for text in shown if text.startswith("substitute: ")}
    assert len(substitute) == 1
    wanted = {label or "no label" for label in LABELS if label != "broken"}
    assert shown - substitute == wanted
    assert page.count('class="crop') == 8, "an MAE run has no guidance view"
    assert "the data has changed" in page.lower(), "config.json describes other data"
    assert "No attention maps" in page
    assert "checkpoint" in page


def test_lmim_views_come_in_pairs(tmp_path: Path, crops: Path) -> None:
    run = make_run(tmp_path / "run", data=(str(crops),), objective="lmim", teacher="random")
    assert report(run, samples=5, maps=0).count('class="crop') == 10
    alone = make_run(
        tmp_path / "alone",
        data=(str(crops),),
        objective="lmim",
        teacher="random",
        model=preset("tiny", guidance=False),
    )
    assert report(alone, samples=5, maps=0).count('class="crop') == 5


def test_report_draws_the_crops_that_the_run_saw_first(tmp_path: Path, crops: Path) -> None:
    run = make_run(tmp_path / "run", data=(str(crops),), seed=5, batch_size=2)
    order = SampleOrder(len(LABELS), 2, seed=5)
    first = [int(index) for step in range(3) for index in order.batch(step)[1]]
    assert numbers(report(run, samples=6, maps=0)) == first
    assert sorted(numbers(report(run, samples=48, maps=0))) == list(range(len(LABELS)))


def numbers(page: str) -> list[int]:
    """Sample numbers on the sheet of views."""
    return [int(number) for number in re.findall(r'<span class="note">#(\d+)</span>', page)]


def test_lines_of_a_resumed_run_are_one_curve(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = [line(step, loss=float(step)) for step in (10, 20, 30, 40)]
    again = [line(step, loss=float(-step)) for step in (30, 40, 50)]
    path.write_text("".join(first + again))
    metrics = read_metrics(path)
    assert metrics.steps.tolist() == [10, 20, 30, 40, 50]
    assert metrics.column("loss").tolist() == [10, 20, -30, -40, -50]
    assert metrics.replayed == 2
    assert "2 lines that it logged again" in report(make_run(tmp_path / "run", first + again, steps=50))


def test_held_out_losses_are_points_beside_the_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "held-out" not in report(run)
    (run / "eval.jsonl").write_text('{"step": 15, "loss": 1.0}\n{"step": 30, "loss": null}\n')
    page = report(run)
    assert page.count('<span class="key ink">held-out</span>') == 1
    assert "1 (step 15)" in page
    assert "not finite (step 30)" in page
    (run / "eval.jsonl").write_text("torn")
    assert "No held-out loss: " in report(run)


def test_malformed_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    bad = ["{torn\n", "[1, 2]\n", '{"loss": 1}\n', '{"step": "7"}\n', '{"step": true}\n', '{"step": -1}\n']
    bad += ["\x00\xff\n", "[" * 100_000 + "\n"]
    odd = '{"step": 3, "loss": "low", "lr": null, "grad_norm": Infinity, "epoch": 1' + "0" * 400 + "}\n"
    run = make_run(tmp_path / "run", [line(1), *bad[:3], "\n", line(2), *bad[3:], odd], steps=3)
    metrics = read_run(run).metrics
    assert metrics.steps.tolist() == [1, 2, 3]
    assert metrics.malformed == len(bad)
    assert all(np.isnan(metrics.column(name)[2]) for name in ("loss", "lr", "epoch", "never_logged"))
    page = report(run)
    assert "Skipped 8 malformed lines" in page
    assert "not finite in 1 of 3 logged lines" in page


def test_what_is_no_run_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run folder at .*nowhere"):
        report(tmp_path / "nowhere")
    for name in ("config.json", "metrics.jsonl"):
        run = make_run(tmp_path / f"without {name}")
        (run / name).unlink()
        with pytest.raises(UsageError, match=f"has no {name}"):
            report(run)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"config": []}', '{"config": {"data": ["a"], "magic": 1}}']
)
def test_a_config_that_cannot_be_used_is_a_clear_error(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.json").write_text(text)
    with pytest.raises(LmimError, match=r"config\.json is not a config of this version"):
        report(run)


@pytest.mark.parametrize(("lines", "found"), [([], "no line"), (["{\n", "{\n"], "2 malformed lines")])
def test_metrics_without_a_step_are_a_clear_error(tmp_path: Path, lines: list[str], found: str) -> None:
    with pytest.raises(LmimError, match=rf"metrics\.jsonl holds {found}.*no step yet"):
        report(make_run(tmp_path / "run", lines))


def test_an_output_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UsageError, match="is a folder"):
        report(run, output=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the report"):
        report(run, output=str(tmp_path / "file" / "page.html"))
    assert "<h1>run</h1>" in report(run, output=str(tmp_path / "new" / "page.html"))


def test_a_write_that_fails_halfway_leaves_the_old_page_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("old page")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (4096, limits[1])
    )  # as a full disk: part of the page is written
    try:
        with pytest.raises(LmimError, match="cannot write the report"):
            write_report(ReportConfig(run=str(run)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "report.html").read_text() == "old page"
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "report.html"]


def test_values_at_the_edge_of_a_float_and_a_byte_order_mark_cost_no_page_and_no_line(tmp_path: Path) -> None:
    edge = 1.7e308
    names = ("loss", "lr", "grad_norm", "images_per_second", "data_wait_fraction", "bad_records", "epoch")
    lines = [line(1), *(line(step, **dict.fromkeys(names, edge * (-1) ** step)) for step in (2, 3)), line(4)]
    lines.append(line(5, elapsed_seconds=edge, skipped_steps=edge, memory_bytes=edge))
    run = make_run(tmp_path / "run", ["\ufeff", *lines])
    metrics = read_run(run).metrics
    assert metrics.steps.tolist() == [1, 2, 3, 4, 5]
    assert metrics.malformed == 0
    assert "not finite in 2 of 5 logged lines" in report(run)


def test_an_objective_that_is_none_is_named_with_those_there_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "config.json"
    path.write_text(path.read_text().replace('"objective": "mae"', '"objective": "odd"'))
    with pytest.raises(LmimError, match="objective must be one of lmim, mae, got 'odd'"):
        report(run)
