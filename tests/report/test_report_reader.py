"""The report of a real, tiny fine-tuning: validation, wrong readings, augmented crops, where it looks."""

import html
import json
import re
from pathlib import Path

import pytest
import torch
from finetune_runs import options, write_words

from lmim_fast import cli
from lmim_fast.config import ReportConfig
from lmim_fast.report import write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    data, held = write_words(folder / "words", 30), write_words(folder / "held", 7)
    more = ["--val", str(held), "--validate-every", "4", "--optim.ema-decay", "0.5"]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main(["finetune", *options(data, folder / "run", *more)]) == 0
    finally:
        torch.set_num_threads(before)
    return folder / "run"


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(ReportConfig(run=str(run), samples=8, maps=2)).read_text(encoding="utf-8")


def test_the_page_says_recipe_characters_and_what_was_changed(page: str) -> None:
    assert 'class="warning"' not in page
    text = html.unescape(re.sub("<[^>]*>", " ", page))
    assert "Recogniser" in text
    assert "lmim, changed: " in text
    assert "optim.ema_decay 0.5" in text
    assert "94 (94)" in text


def test_the_page_has_the_curve_of_every_validation_set(page: str, run: Path) -> None:
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    section = page[page.index("<h2>Validation</h2>") : page.index("<h2>Views</h2>")]
    best = max(line["accuracy"] for line in lines)
    assert f"Best: {best:.2%} mean accuracy" in section
    assert section.count("<svg") == 2


def test_the_page_shows_what_was_read_wrongly_with_its_crop(page: str, run: Path) -> None:
    wrong = json.loads((run / "wrong_readings.json").read_text())["wrong"]
    section = page[page.index("<h2>Wrong readings at step 12</h2>") : page.index("<h2>Views</h2>")]
    assert wrong
    assert section.count("<figure>") == section.count("data:image/png") == len(wrong)
    assert f"label: {html.escape(wrong[0]['label'])}" in section


def test_the_sheet_has_plain_and_augmented_crops(page: str) -> None:
    section = page[page.index("<h2>Views</h2>") : page.index("<h2>Where it looks")]
    assert section.count("plain view: ") == section.count("augmented crop: ") == 8
    pictures = re.findall(r'src="(data:image/png;base64,[^"]*)"', section)
    assert len(set(pictures)) > 8, "augmented crops differ from plain ones"


def test_the_page_shows_the_attention_of_every_token_that_is_read(page: str) -> None:
    section = page[page.index("<h2>Where it looks") : page.index("<h2>Details</h2>")]
    cards = section.split('<article class="maps">')[1:]
    assert len(cards) == 2
    for card in cards:
        assert "read as " in card
        row = card[card.index("<h4>Decoder") :]
        assert row.count('class="heat"') == row.count("<figcaption>") >= 1


def test_validation_sets_that_are_gone_cost_only_their_pictures(run: Path, tmp_path: Path) -> None:
    document = json.loads((run / "config.json").read_text())
    document["config"]["val"] = [str(tmp_path / "held")]
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(document))
    for name in ("metrics.jsonl", "validation.jsonl", "wrong_readings.json"):
        (copy / name).write_text((run / name).read_text())
    text = write_report(ReportConfig(run=str(copy), samples=2, maps=0)).read_text(encoding="utf-8")
    assert "No crops to show: --val" in text
    assert "<h2>Validation</h2>" in text
