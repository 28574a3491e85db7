"""The comparison of starts: what is run in which order, equal time, and the table."""

import json
from pathlib import Path

import pytest

from benchmarks import tables, value

SECONDS = {"mae": 100.0, "lmim": 200.0}  # of pre-training; a fine-tuning takes half a second a step


class Lmim:
    """Stands for the command: leaves what it would, at once."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, arguments: list[str], jobs: int) -> None:
        self.calls.append(list(arguments))
        if arguments[0] == "evaluate":
            accuracy = 10.0 * int(arguments[1][-1]) + 5
            folder = Path(arguments[1]) / "evaluation"
            folder.mkdir()
            document = {"sets": [{"name": "digits", "accuracy": accuracy}]}
            (folder / "evaluation.json").write_text(json.dumps(document))
            return
        run, steps = Path(self.option("--output")), int(self.option("--steps"))
        run.mkdir(parents=True)
        seconds = SECONDS.get(run.name, 0.5 * steps)
        (run / "metrics.jsonl").write_text(json.dumps({"elapsed_seconds": seconds}) + "\n")
        if arguments[0] == "pretrain":
            (run / "encoder.safetensors").write_bytes(b"")

    def option(self, name: str) -> str:
        return self.calls[-1][self.calls[-1].index(name) + 1]


def compare(folder: Path, lmim: Lmim) -> dict:
    comparison = value.Comparison(
        *(value.SIZES["tiny"], folder),
        train=["labelled"],
        tests=["digits=test"],
        unlabelled=["crops"],
        seeds=[0, 1],
        lmim=lmim,
    )
    return comparison.run()


def test_starts_are_compared_at_equal_steps_and_at_equal_time(tmp_path: Path) -> None:
    rows = compare(tmp_path, Lmim())["rows"]
    steps = value.SIZES["tiny"].finetune_steps
    whole = 300 + 0.5 * steps
    assert [(row["at"], row["start"], row["steps"]) for row in rows] == [
        ("equal steps", "scratch", steps),
        ("equal steps", "mae", steps),
        ("equal steps", "lmim", steps),
        ("equal time", "scratch", steps + 600),
        ("equal time", "mae", steps + 400),
        ("equal time", "lmim", steps),
    ]
    assert [row["seconds"] for row in rows[3:]] == [whole, whole, whole]
    assert [row["seconds"] for row in rows[:3]] == [0.5 * steps, 100 + 0.5 * steps, whole]


def test_a_fine_tuning_differs_from_another_in_start_steps_and_seed_alone(tmp_path: Path) -> None:
    lmim = Lmim()
    compare(tmp_path, lmim)
    runs = [call for call in lmim.calls if call[0] == "finetune"]
    assert len(runs) == 2 * 5
    assert all("labelled" in call and "crops" not in call for call in runs)
    starts = [call[call.index("--init") + 1] if "--init" in call else None for call in runs]
    assert set(starts) == {None, str(tmp_path / "mae"), str(tmp_path / "lmim")}
    free = ("--init", "--output", "--steps", "--seed", "--optim.warmup-steps")
    rest = set()
    for call in runs:
        kept = list(call)
        for name in free:
            if name in kept:
                del kept[kept.index(name) : kept.index(name) + 2]
        rest.add(tuple(kept))
    assert len(rest) == 1
    pretrained = [call for call in lmim.calls if call[0] == "pretrain"]
    assert [call[call.index("--objective") + 1] for call in pretrained] == ["mae", "lmim"]
    assert pretrained[1][pretrained[1].index("--teacher") + 1] == str(tmp_path / "mae")
    assert all(call[call.index("--data") + 1] == "crops" for call in pretrained)


def test_a_second_call_runs_nothing_that_is_done(tmp_path: Path) -> None:
    first, second = Lmim(), Lmim()
    rows = compare(tmp_path, first)["rows"]
    assert compare(tmp_path, second)["rows"] == rows
    assert second.calls == []


def test_the_table_has_mean_and_spread_of_the_seeds(tmp_path: Path) -> None:
    machine = {"device": "cpu", "cores": 2, "threads": 1, "versions": {"torch": "2"}, "commit": "abc"}
    result = {"benchmark": "value", **machine, "data": "digits", **compare(tmp_path / "runs", Lmim())}
    results = tmp_path / "results"
    results.mkdir()
    (results / "value.json").write_text(json.dumps(result))
    page = tables.render(results)
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert "## What pre-training is worth: tiny, digits" in page
    assert lines[0] == "| compared at | start | fine-tuning steps | seconds | digits |"
    assert lines[2] == "| equal steps | random | 1,200 | 600 | 10.0 ± 7.1 |"
    assert len(lines) == 2 + 6


def test_a_run_that_fails_ends_the_comparison(tmp_path: Path) -> None:
    def failing(arguments: list[str], jobs: int) -> None:
        raise RuntimeError("no data")

    comparison = value.Comparison(
        *(value.SIZES["tiny"], tmp_path), train=["x"], tests=["y"], unlabelled=[], seeds=[0], lmim=failing
    )
    with pytest.raises(RuntimeError, match="no data"):
        comparison.run()
