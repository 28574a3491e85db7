"""The report of real runs: attention maps and reconstructions, and the page in a real browser."""

import base64
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from report_runs import write_crops

from lmim_fast.config import DataConfig, PretrainConfig, ReportConfig, preset
from lmim_fast.ops.masking import mask_noise, select_patches
from lmim_fast.ops.philox import Stream
from lmim_fast.pretrain import run_pretrain
from lmim_fast.report.write import write_report

# The crops lack a label on purpose, which the record store remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:.*some lack image or label:UserWarning")

SAMPLES, MAPS, HEADS, QUERIES = 8, 2, 3, 4


@dataclass(frozen=True)
class Pages:
    mae: Path
    lmim: Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Reports of an MAE run of three steps and of an LMIM run with it as teacher."""
    folder = tmp_path_factory.mktemp("runs")
    common = dict(
        data=(str(write_crops(folder / "crops")),),
        preset="tiny",
        model=preset("tiny", depth=2),
        batch_size=8,
        steps=3,
        log_every=1,
        precision="fp32",
        device="cpu",
        loader=DataConfig(threads=1, max_bad_fraction=0.5),
    )
    mae = run_pretrain(PretrainConfig(output=str(folder / "mae"), objective="mae", **common))  # type: ignore[arg-type]
    lmim = run_pretrain(PretrainConfig(output=str(folder / "lmim"), teacher=str(mae), **common))  # type: ignore[arg-type]
    return Pages(
        *(write_report(ReportConfig(run=str(run), samples=SAMPLES, maps=MAPS)) for run in (mae, lmim))
    )


def captions(page: str) -> list[str]:
    cards = page[page.index("<article") : page.index("<h2>Details")]
    return re.findall(r"<figcaption>([^<]*)<", cards)


def test_lmim_page_shows_encoder_and_decoder_attention(pages: Pages) -> None:
    page = pages.lmim.read_text(encoding="utf-8")
    assert 'class="warning"' not in page
    assert "finished, 3 steps" in page
    card = ["plain view", "guidance view", "visible patches (20%)", "mean of heads"]
    card += [f"head {head} of {HEADS}" for head in (1, 2, 3)]
    for start in range(0, len(captions(page)), len(card) + QUERIES):
        found = captions(page)[start : start + len(card) + QUERIES]
        assert found[: len(card)] == card
        assert all(caption.startswith("query: row") for caption in found[len(card) :])
    assert len(captions(page)) == MAPS * (len(card) + QUERIES)
    assert page.count('class="heat"') == MAPS * (1 + HEADS + QUERIES)
    assert page.count('class="box"') == MAPS * QUERIES


def test_mae_page_shows_the_prediction_in_place_of_decoder_attention(pages: Pages) -> None:
    page = pages.mae.read_text(encoding="utf-8")
    assert 'class="warning"' not in page
    row = ["plain view", "visible patches (25%)", "prediction", "mean of heads"]
    assert captions(page)[: len(row)] == row
    assert captions(page).count("prediction") == MAPS
    assert 'class="box"' not in page
    plain, visible, prediction = (
        picture(page, name) for name in ("plain view", "visible patches", "prediction")
    )
    kept = (visible == plain).all(axis=2)
    assert 0.2 < kept.mean() < 0.35
    assert (prediction[kept] == plain[kept]).all(), "visible patches are the crop's own"
    assert (prediction[~kept] != plain[~kept]).any()


def picture(page: str, name: str) -> np.ndarray:
    """The pixels of the first picture with that alternative text, below the sheet of views."""
    found = re.search(rf'alt="{name}" src="data:image/png;base64,([^"]*)"', page[page.index("<article") :])
    assert found, name
    return cv2.imdecode(np.frombuffer(base64.b64decode(found[1]), np.uint8), cv2.IMREAD_COLOR)


@pytest.mark.parametrize(("objective", "stream"), [("mae", Stream.MAE_MASK), ("lmim", Stream.MASK)])
def test_masks_are_those_of_the_run(pages: Pages, objective: str, stream: Stream) -> None:
    page = getattr(pages, objective).read_text(encoding="utf-8")
    index = re.search(r'<article.*?<span class="note">#(\d+)</span>', page)
    assert index
    noise = mask_noise(0, 0, torch.tensor([int(index[1])]), 256, stream)
    kept, _ = select_patches(noise, 64 if objective == "mae" else 51)
    plain, visible = picture(page, "plain view"), picture(page, "visible patches")
    same = (plain == visible).all(axis=2).reshape(8, 4, 32, 4).all(axis=(1, 3))
    assert np.flatnonzero(same).tolist() == kept[0].tolist()


def test_asking_for_no_maps_leaves_the_section_out(pages: Pages, tmp_path: Path) -> None:
    output = str(tmp_path / "page.html")
    page = write_report(ReportConfig(run=str(pages.lmim.parent), output=output, maps=0)).read_text()
    assert "<h2>Views" in page
    assert "<h2>Attention" not in page


@dataclass(frozen=True)
class Visit:
    """What a browser saw: console lines, addresses the page asked for, the screenshot."""

    console: list[str]
    requests: list[str]
    screenshot: np.ndarray


def visit(page: Path, folder: Path, *, size: tuple[int, int] = (1400, 2400)) -> Visit:
    """Open a page in headless Chromium, without any name resolution, and take a screenshot."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    folder.mkdir()
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    )
    flags += " --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
    command = [browser, *flags.split(), f"--user-data-dir={folder / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={folder / 'net.json'}"]
    command += [f"--window-size={size[0]},{size[1]}", f"--screenshot={folder / 'page.png'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    log = json.loads((folder / "net.json").read_text())
    start = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [
        event["params"]
        for event in log["events"]
        if event["type"] == start and "url" in event.get("params", {})
    ]
    # The browser's own requests (updates, accounts) have no origin; a page's have one.
    asked = [job["url"] for job in jobs if job.get("initiator") != "not an origin"]
    image = cv2.imread(str(folder / "page.png"))
    assert image is not None, done.stderr
    console = [text for text in done.stderr.splitlines() if ":CONSOLE" in text]
    return Visit(console, [url for url in asked if not url.startswith(("data:", "file:"))], image)


@pytest.mark.slow
def test_browser_shows_the_page_without_an_error_or_a_request(pages: Pages, tmp_path: Path) -> None:
    for page in (pages.mae, pages.lmim):
        seen = visit(page, tmp_path / page.parent.name)
        assert seen.console == []
        assert seen.requests == []
        assert seen.screenshot.shape == (2400, 1400, 3)
        rows = seen.screenshot.reshape(24, 100, -1).std(axis=(1, 2))
        assert (rows[:18] > 2).all(), "a blank stretch in the upper three quarters of the page"


@pytest.mark.slow
def test_pointing_at_a_chart_reads_its_values(pages: Pages, tmp_path: Path) -> None:
    probe = """<script>
      const shown = [...document.querySelectorAll(".plot svg")].find((one) => one.clientWidth > 0);
      const frame = shown.getBoundingClientRect();
      const at = { clientX: frame.right - 20, clientY: frame.top + 20, bubbles: true };
      shown.dispatchEvent(new PointerEvent("pointermove", at));
      console.log(document.querySelector(".tip").innerText.replace(/\\n/g, "; "));
    </script>"""
    page = tmp_path / "probed.html"
    page.write_text(pages.lmim.read_text(encoding="utf-8") + probe, encoding="utf-8")
    (console,) = visit(page, tmp_path / "browser").console
    assert re.search(r'"step 3; loss\s+\d\S*; reconstruction\s+\d\S*; cls alignment\s+\d\S*"', console)


@pytest.mark.slow
def test_the_browser_check_sees_errors_and_requests(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://outside.invalid/a.png"><script>console.error("oops")</script>')
    seen = visit(page, tmp_path / "browser")
    assert len(seen.console) == 1
    assert seen.requests == ["http://outside.invalid/a.png"]
