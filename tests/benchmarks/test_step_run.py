"""How the benchmark of whole steps is run: processes, rounds, memory, what is printed."""

import dataclasses
import json
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_step, step_measure, step_parts
from benchmarks.floors import Ceilings
from benchmarks.step_floor import step_seconds
from benchmarks.step_variants import Candidate, Setting
from benchmarks.step_workers import Request, VariantFailed, Worker, measure_memory, serve_steps
from lmim_fast.config import preset

ROOT = Path(__file__).parents[2]
CONFIG = preset("tiny", depth=2, decoder_depth=1, decoder_dropout=0.0)
ON_CPU = Setting(CONFIG, 2, "cpu", False)
FIRST = [Candidate("default", "default")]


def test_a_variant_that_fails_is_told_and_the_others_are_measured() -> None:
    broken = step_measure.Comparison(["ours+graph", "ours"], [ON_CPU], warmup=1, rounds=2)
    broken.run()
    (failed,) = broken.failed
    assert (failed["variant"], failed["batch"], failed["dropout"]) == ("ours+graph", 2, 0.0)
    assert failed["error"] == "ValueError: ours+graph needs a CUDA device, got cpu"
    (row,) = broken.rows
    assert (row["variant"], len(row["milliseconds"])) == ("ours", 2)
    assert row["images_per_second"] == pytest.approx(2e3 * 2 / sum(row["milliseconds"]))
    assert 1e5 < row["peak_memory"] < 1e9
    assert row["share_of_floor"] is None


def test_a_process_that_dies_is_told() -> None:
    worker = Worker(_die)
    with pytest.raises(VariantFailed, match="ended with 7"):
        worker.ask("prepare")
    worker.end()


def _die(pipe: Connection) -> None:
    pipe.recv()
    os._exit(7)


def test_memory_of_a_step_grows_with_the_batch() -> None:
    small, large = (
        measure_memory(Request("released", ON_CPU._replace(batch=batch), FIRST, False)) for batch in (2, 16)
    )
    assert large > 3 * small


def test_rounds_before_an_interruption_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second variant is interrupted in its first round that counts, the first one has had that round."""
    asked = step_measure._Lane.ask
    turns: list[str] = []

    def ask(self: step_measure._Lane, order: str) -> Any:
        turns.append(order)
        if turns.count("turn") == 4:
            raise KeyboardInterrupt
        return asked(self, order)

    monkeypatch.setattr(step_measure._Lane, "ask", ask)
    comparison = step_measure.Comparison(["ours", "sdpa"], [ON_CPU], warmup=1, rounds=3, products=64)
    with pytest.raises(KeyboardInterrupt):
        comparison.run()
    (row,) = comparison.rows
    assert (row["variant"], len(row["milliseconds"]), row["peak_memory"]) == ("ours", 1, None)
    result = dict(device="cpu", dtype="float32", preset="tiny", gemm_size=64, gemm_flops=None, failed=[])
    assert bench_step.text(result | dict(rows=[row | dict(mfu=None)])).endswith(" -  ")


def test_parts_are_measured_after_all_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(
        step_measure.Comparison,
        "_compare",
        lambda self, lanes: order.append(f"steps {lanes[0].request.setting.batch}"),
    )
    monkeypatch.setattr(
        step_measure.Comparison,
        "_measure_parts",
        lambda self, setting: order.append(f"parts {setting.batch}"),
    )
    settings = [ON_CPU, ON_CPU._replace(batch=3)]
    step_measure.Comparison(["ours"], settings, warmup=0, rounds=1, parts=True).run()
    assert order == ["steps 2", "steps 3", "parts 2", "parts 3"]


def test_the_share_of_the_floor_is_that_of_the_median_round() -> None:
    ceilings = Ceilings(1e10, 1e11)
    comparison = step_measure.Comparison(["ours"], [ON_CPU], warmup=0, rounds=3, ceilings=ceilings)
    comparison.run()
    (row,) = comparison.rows
    floor = step_seconds(CONFIG, 2, 4, ceilings) * 1e3
    assert row["share_of_floor"] == pytest.approx(floor / sorted(row["milliseconds"])[1])


def test_products_are_measured_in_every_round_that_counts() -> None:
    comparison = step_measure.Comparison(["ours"], [ON_CPU], warmup=1, rounds=3, products=64)
    comparison.run()
    assert len(comparison.product_rates) == 3
    assert all(1e6 < rate < 1e13 for rate in comparison.product_rates)
    assert comparison.rows[0]["gemm_flops"] == sorted(comparison.product_rates)[1]


def test_products_that_fail_are_told_and_steps_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_measure, "serve_products", _fail)
    comparison = step_measure.Comparison(["ours"], [ON_CPU], warmup=0, rounds=2, products=64)
    comparison.run()
    assert [(row["variant"], row["error"]) for row in comparison.failed] == [
        ("products", "ValueError: no products here")
    ]
    (row,) = comparison.rows
    assert len(row["milliseconds"]) == 2
    assert (comparison.product_rates, "gemm_flops" in row) == ([], False)


def _fail(pipe: Connection, size: int, dtype: torch.dtype) -> None:
    pipe.recv()
    raise ValueError("no products here")


def test_steps_without_products_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: step_measure.Comparison) -> None:
        row = dict(variant="ours", batch=2, dropout=0.0, milliseconds=[5.0], share_of_floor=None)
        self.rows.append(row | dict(images_per_second=10.0, peak_memory=1))

    monkeypatch.setattr(step_measure.Comparison, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench_step", "--device", "cpu", "--preset", "tiny"])
    assert bench_step.main() == 0
    assert "product of 4096^3: - GFLOP/s" in capsys.readouterr().out


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.bench_step", "--device", "cpu", "--preset", "tiny"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_graph_needs_a_cuda_device() -> None:
    result = run_benchmark("--variants", "ours", "ours+graph")
    assert result.returncode == 2
    assert "ours+graph needs a CUDA device" in result.stderr


@pytest.mark.parametrize(
    ("error", "failed", "code"),
    [
        (None, [], 0),
        (None, [dict(variant="sdpa", batch=2, error="of memory")], 1),
        (KeyboardInterrupt, [], 130),
    ],
)
def test_what_is_measured_is_printed_however_the_run_ends(
    error: type[BaseException] | None,
    failed: list[dict[str, Any]],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(self: step_measure.Comparison) -> None:
        self.rows.append(dict(variant="ours", images_per_second=10.0))
        self.product_rates += [2e12, 1e12, 1e11]
        self.failed += failed
        if error is not None:
            raise error

    monkeypatch.setattr(step_measure.Comparison, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench_step", "--device", "cpu", "--preset", "tiny", "--json"])
    assert bench_step.main() == code
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert row["mfu"] == pytest.approx(10 * found["flops_per_image"] / 1e12)
    assert found["failed"] == failed
    assert found.get("interrupted", False) == (code == 130)


@pytest.mark.slow
def test_all_variants_of_a_cpu_run_side_by_side_and_are_shown() -> None:
    arguments = ["--batch", "2", "--rounds", "2", "--warmup", "1", "--dropout", "0.1", "--parts"]
    result = run_benchmark(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == ["released", "sdpa", "compiled", "ours"]
    assert rows["compiled"]["chosen"] == dict(mode="default", attention="default")
    for row in rows.values():
        assert row["mfu"] == pytest.approx(
            row["images_per_second"] * found["flops_per_image"] / found["gemm_flops"]
        )
    assert {row["variant"] for row in found["parts"]} == set(step_parts.VARIANTS)
    shown = bench_step.text(found)
    assert "default, default attention" in shown
    assert "student (masked + guidance), backward" in shown


@pytest.mark.gpu
def test_a_captured_step_runs_in_turns_and_tells_its_memory() -> None:
    setting = Setting(dataclasses.replace(CONFIG, residual="bf16"), 8, "cuda", True)
    worker = Worker(serve_steps, Request("ours+graph", setting, [], False))
    assert worker.ask("prepare") == (None, [])
    assert worker.ask("turn") > 0
    assert 1e6 < worker.ask("memory") < 2e9
    worker.end()
