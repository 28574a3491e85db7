"""How the benchmark of whole steps is run: rounds, memory, what is written and printed."""

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import dying
import pytest
import torch

from benchmarks import bench_step, step_memory, step_parts, step_rounds, step_variants
from benchmarks.floors import Ceilings
from benchmarks.machine import Record
from benchmarks.step_floor import step_seconds
from benchmarks.step_memory import peak_bytes
from benchmarks.step_rounds import Comparison
from benchmarks.step_variants import Candidate, Prepared, Search, Setting
from lmim_fast.config import preset

ROOT = Path(__file__).parents[2]
CONFIG = preset("tiny", depth=2, decoder_depth=1, decoder_dropout=0.0)
ON_CPU = Setting(CONFIG, 2, "cpu", False)
FIRST = Search([Candidate("default", "default")])


def compared(
    *variants: str, path: Path | None = None, settings: Any = (ON_CPU,), **options: Any
) -> Comparison:
    record = Record(path, "step", torch.device("cpu"), parts=[])
    options = dict(warmup=1, rounds=2, search=FIRST, flops=1e9, memory=False) | options
    return Comparison(record, variants, settings, **options)


def test_a_variant_that_fails_is_told_and_the_others_are_measured() -> None:
    broken = compared("ours+graph", "ours", memory=True)
    broken.run()
    (failed,) = broken.record.result["failed"]
    assert (failed["variant"], failed["batch"], failed["dropout"]) == ("ours+graph", 2, 0.0)
    assert failed["error"] == "ValueError: ours+graph needs a CUDA device, got cpu"
    (row,) = broken.record.result["rows"]
    assert (row["variant"], len(row["milliseconds"])) == ("ours", 2)
    assert row["images_per_second"] == pytest.approx(2e3 * 2 / sum(row["milliseconds"]))
    assert 1e5 < row["peak_memory"] < 1e9
    assert row["share_of_floor"] is None
    assert "preliminary" not in row
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ


@pytest.mark.slow
def test_memory_of_a_step_grows_with_the_batch() -> None:
    small, large = (peak_bytes("released", ON_CPU._replace(batch=batch), None) for batch in (2, 16))
    assert large > 3 * small


def test_a_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_memory, "_measure", dying.die)
    with pytest.raises(BrokenProcessPool):
        peak_bytes("ours", None, None)  # a setting is of a module that takes seconds to import


def written(path: Path) -> list[tuple[str, int, bool]]:
    """Variant, rounds and whether it is preliminary, of each row in a file."""
    rows = json.loads(path.read_text())["rows"]
    return [(row["variant"], len(row["milliseconds"]), "preliminary" in row) for row in rows]


class Turns:
    """Stands for variants: notes what runs, and what the file of results holds by then."""

    def __init__(self, path: Path, fail_at: int = -1, error: BaseException | None = None) -> None:
        self.path, self.fail_at, self.error = path, fail_at, error
        self.order: list[str] = []
        self.seen: list[list[tuple[str, int, bool]]] = []

    def prepare(self, variant: str, setting: Setting, search: Search) -> Prepared:
        self.order.append(f"prepare {variant}")
        return Prepared(lambda: self.run(variant))

    def run(self, variant: str) -> None:
        self.order.append(variant)
        self.seen.append(written(self.path))
        if len(self.seen) - 1 == self.fail_at and self.error is not None:
            raise self.error


def test_rounds_alternate_and_every_figure_is_in_the_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled ones are prepared last; each warms up when it is prepared."""
    path = tmp_path / "step.json"
    turns = Turns(path)
    monkeypatch.setattr(step_rounds, "prepare", turns.prepare)
    compared("compiled", "sdpa", "ours+compile", "ours", path=path).run()
    warm_ups = [[f"prepare {name}", name] for name in ("sdpa", "ours", "compiled", "ours+compile")]
    a_round = ["compiled", "sdpa", "ours+compile", "ours"]
    assert turns.order == [step for steps in warm_ups for step in steps] + a_round * 2
    preliminary = [(name, 1, True) for name in a_round]
    assert turns.seen[0] == []
    assert turns.seen[1] == [("sdpa", 1, True)]
    assert turns.seen[4] == turns.seen[7] == preliminary
    assert turns.seen[8] == [(name, 1, False) for name in a_round]
    assert written(path) == [(name, 2, False) for name in a_round]


def test_a_variant_that_fails_in_a_round_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(tmp_path / "step.json", 2, RuntimeError("out of memory\nand more"))
    monkeypatch.setattr(step_rounds, "prepare", turns.prepare)
    comparison = compared("ours", "sdpa", path=turns.path)
    comparison.run()
    assert turns.order[-3:] == ["ours", "sdpa", "sdpa"]
    assert written(turns.path) == [("sdpa", 2, False)]
    (failed,) = json.loads(turns.path.read_text())["failed"]
    assert (failed["variant"], failed["error"]) == ("ours", "RuntimeError: out of memory")


def test_a_variant_that_breaks_the_device_ends_the_comparison_and_is_filed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(tmp_path / "step.json", 3, torch.AcceleratorError("illegal memory access"))
    monkeypatch.setattr(step_rounds, "prepare", turns.prepare)
    with pytest.raises(torch.AcceleratorError):
        compared("ours", "sdpa", path=turns.path).run()
    found = json.loads(turns.path.read_text())
    assert found["verdict"] == "red"
    assert found["failed"][0]["error"] == "AcceleratorError: illegal memory access"
    assert written(turns.path) == [("ours", 1, True), ("sdpa", 1, True)]


def test_rounds_before_an_interruption_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second round is interrupted."""
    turns = Turns(tmp_path / "step.json", 4, KeyboardInterrupt())
    monkeypatch.setattr(step_rounds, "prepare", turns.prepare)
    comparison = compared("ours", "sdpa", path=turns.path, products=64)
    with pytest.raises(KeyboardInterrupt):
        comparison.run()
    assert written(turns.path) == [("ours", 1, False), ("sdpa", 1, False)]
    row = comparison.record.result["rows"][0]
    assert row["peak_memory"] is None
    result = dict(device="cpu", dtype="float32", preset="tiny", gemm_size=64, gemm_flops=None, failed=[])
    assert bench_step.text(result | dict(rows=[row | dict(mfu=None)])).endswith(" -  ")


def test_parts_are_measured_after_all_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(Comparison, "_compare", lambda self, setting: order.append(f"steps {setting.batch}"))
    monkeypatch.setattr(
        step_parts,
        "measure_parts",
        lambda variant, setting, ceilings: order.append(f"{variant} {setting.batch}") or [dict(part=variant)],
    )
    comparison = compared("ours", "compiled", settings=[ON_CPU, ON_CPU._replace(batch=3)], parts=True)
    comparison.run()
    assert order == ["steps 2", "steps 3", "ours 2", "ours 3"]
    assert comparison.record.result["parts"] == [dict(part="ours")] * 2


def test_the_share_of_the_floor_is_that_of_the_median_round() -> None:
    ceilings = Ceilings(1e10, 1e11)
    comparison = compared("ours", rounds=3, ceilings=ceilings)
    comparison.run()
    (row,) = comparison.record.result["rows"]
    floor = step_seconds(CONFIG, 2, 4, ceilings) * 1e3
    assert row["share_of_floor"] == pytest.approx(floor / sorted(row["milliseconds"])[1])


def test_products_are_measured_in_every_round_and_the_step_is_read_against_their_median() -> None:
    comparison = compared("ours", rounds=3, products=64)
    comparison.run()
    rates, (row,) = comparison.record.result["gemm_rounds"], comparison.record.result["rows"]
    assert len(rates) == 3
    assert all(1e6 < rate < 1e13 for rate in rates)
    assert row["gemm_flops"] == comparison.record.result["gemm_flops"] == sorted(rates)[1]
    assert row["mfu"] == pytest.approx(row["images_per_second"] * 1e9 / sorted(rates)[1])


def test_steps_without_products_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: Comparison) -> None:
        row = dict(variant="ours", batch=2, dropout=0.0, milliseconds=[5.0], share_of_floor=None)
        self.record.add(row | dict(images_per_second=10.0, peak_memory=1, mfu=None))

    monkeypatch.setattr(Comparison, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench_step", "--device", "cpu", "--preset", "tiny"])
    assert bench_step.main() == 0
    assert "product of 4096^3: - GFLOP/s" in capsys.readouterr().out


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.bench_step", "--device", "cpu", "--preset", "tiny"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_graph_needs_a_cuda_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--preset", "tiny", "--variants", "ours", "ours+graph"]
    monkeypatch.setattr(sys, "argv", ["bench_step", *arguments])
    with pytest.raises(SystemExit, match="2"):
        bench_step.main()
    assert "ours+graph needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "failed", "code"),
    [
        (None, [], 0),
        (None, [dict(variant="sdpa", batch=2, error="of memory")], 1),
        (torch.AcceleratorError, [dict(variant="sdpa", batch=2, error="illegal access")], 1),
        (KeyboardInterrupt, [], 130),
    ],
)
def test_what_is_measured_is_printed_however_the_run_ends(
    error: type[BaseException] | None,
    failed: list[dict[str, Any]],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(self: Comparison) -> None:
        self.record.result["rows"].append(dict(variant="ours", images_per_second=10.0, share_of_floor=None))
        self.record.result["failed"] += failed
        if error is not None:
            raise error

    monkeypatch.setattr(Comparison, "run", run)
    path = tmp_path / "step.json"
    arguments = ["--device", "cpu", "--preset", "tiny", "--json", "--results", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench_step", *arguments])
    assert bench_step.main() == code
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(path.read_text())
    assert found["rows"][0]["images_per_second"] == 10
    assert found["failed"] == failed
    assert found.get("interrupted", False) == (code == 130)
    assert found["verdict"] == {0: "green", 1: "red", 130: "unfinished"}[code]


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


@pytest.mark.parametrize("variant", ["ours", "ours+graph"])
@pytest.mark.gpu
def test_peak_memory_on_a_device_is_that_of_a_step_also_of_a_graph(variant: str) -> None:
    setting = Setting(dataclasses.replace(CONFIG, residual="bf16"), 64, "cuda", True)
    comparison = compared(variant, settings=[setting])
    comparison.run()
    assert comparison.record.result["failed"] == []
    (row,) = comparison.record.result["rows"]
    step_variants.prepare("ours", setting, FIRST)  # warms libraries up
    before = torch.cuda.memory_allocated()
    prepared = step_variants.prepare("ours", setting, FIRST)
    torch.cuda.reset_peak_memory_stats()
    prepared.run()
    eager = torch.cuda.max_memory_allocated() - before
    assert 0.8 * eager < row["peak_memory"] < 1.6 * eager
