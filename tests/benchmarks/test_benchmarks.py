"""The benchmarks say what they should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_step import step_flops
from lmim_fast.config import preset


@pytest.mark.parametrize(
    ("size", "entry"), [("small", "ViT-S (dec 2)"), ("base", "ViT-B (dec 8, official default)")]
)
def test_flops_of_a_step_are_the_recorded_ones(size: str, entry: str, recorded: Path) -> None:
    expected = json.loads((recorded / "flops.json").read_text())[entry]["total"]["fwdbwd_gflop"]
    assert step_flops(preset(size)) / 1e9 == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_step_benchmark_prints_one_json_object_with_a_row_a_variant() -> None:
    command = [sys.executable, "-m", "benchmarks.bench_step", "--device", "cpu", "--preset", "tiny"]
    command += ["--batch", "2", "--variants", "released", "ours", "--rounds", "2", "--warmup", "1", "--json"]
    output = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    result = json.loads(output.stdout)
    assert result["device"]
    assert [(row["variant"], row["batch"], row["dropout"]) for row in result["rows"]] == [
        ("released", 2, 0.0),
        ("ours", 2, 0.0),
    ]
    for row in result["rows"]:
        assert len(row["milliseconds"]) == 2
        assert row["images_per_second"] == pytest.approx(2e3 * 2 / sum(row["milliseconds"]))
        assert 1e6 < row["peak_memory"] < 1e10
