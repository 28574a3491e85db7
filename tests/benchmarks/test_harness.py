"""Benchmarks of operations: what they check, what they write, and when a comparison fails."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import compare, floors, gpu, harness, tables
from benchmarks.correctness import assert_correct
from benchmarks.harness import Operation

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHORT_GELU = "bias_gelu and ViT-S and N52"


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_run_writes_rows_whose_figures_follow_from_the_raw_times(tmp_path: Path) -> None:
    path = tmp_path / "ops.json"
    result = run_benchmarks("--batches", "8", "-k", SHORT_GELU + " and not compiled", "--results", str(path))
    assert result.returncode == 0, result.stdout
    found = json.loads(path.read_text())
    assert found["benchmark"] == "ops"
    assert found["device"]
    ceilings = floors.Ceilings(**found["ceilings"])
    assert ceilings.bandwidth > 1e8
    assert ceilings.flops > 1e8
    rows = {(row["direction"], row["variant"]): row for row in found["rows"]}
    assert set(rows) == {(direction, name) for direction in harness.DIRECTIONS for name in ("ours", "eager")}
    for (direction, variant), row in rows.items():
        assert row["sizes"] == dict(model="ViT-S", batch=8, tokens=52, width=1536, p=0.0)
        assert row["bytes"] == 8 * 52 * 1536 * harness.DTYPE.itemsize * (2 if direction == "forward" else 5)
        median = statistics.median(row["microseconds"])
        assert row["floor_us"] == pytest.approx(row["bytes"] / ceilings.bandwidth * 1e6)
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_us"] / median)
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / median / 1e3)
        assert len(row["microseconds"]) >= 5
        if harness.DEVICE.type == "cpu" and variant == "ours":
            assert row["form"] == "PyTorch alone"
    page = tables.ops_page(path)
    assert "| ViT-S B8 N52 D1536 | forward |" in page


def test_an_operation_slower_than_the_saved_run_fails_and_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "STORAGE", tmp_path / ".benchmarks")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
    for name in ("benchmarks", "lmim_fast", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    options = ["--batches", "8", "-k", f"ours and {SHORT_GELU} and not backward"]
    assert compare.main(options) == 0
    assert "No run on this device yet" in capfd.readouterr().out
    (last,) = (tmp_path / ".benchmarks").glob("*/last.json")
    saved = last.read_text()
    assert compare.main([*options, "-p", "slower"]) == 1
    assert "Performance has regressed" in capfd.readouterr().err
    assert last.read_text() == saved


def make_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, weight = torch.randn(64, 32, device=device, dtype=dtype), torch.randn(32, device=device)
    return x.requires_grad_(), weight.requires_grad_()


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return (x * weight.to(x.dtype)).exp()


def good(x: Tensor, weight: Tensor, seed: Tensor | None = None) -> Tensor:
    return plain(x, weight)


def wrong_by_a_little(x: Tensor, weight: Tensor, seed: Tensor | None = None) -> Tensor:
    return plain(x, weight) * (1 + 1e-4)


def wrong_in_one_row(x: Tensor, weight: Tensor, seed: Tensor | None = None) -> Tensor:
    rows = torch.ones(64, 1, dtype=x.dtype)
    rows[7] = 1.01
    return plain(x, weight) * rows


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.001


def wrong_gradient(x: Tensor, weight: Tensor, seed: Tensor | None = None) -> Tensor:
    return plain(x, WrongGradient.apply(weight))


def operation(ours: Any) -> Operation:
    return Operation(
        f"product by {ours.__name__}",
        dict(model="test", batch=1, tokens=64, p=0.0),
        make_inputs,
        plain,
        dict(ours=ours),
        lambda itemsize, training: floors.layer_norm(64, 32, itemsize, itemsize),
    )


def test_a_right_form_is_accepted_and_what_ran_is_told() -> None:
    assert harness.check(operation(good), "ours") == "PyTorch alone"


@pytest.mark.parametrize("ours", [wrong_by_a_little, wrong_in_one_row, wrong_gradient])
def test_no_speed_is_reported_for_a_wrong_form(ours: Any) -> None:
    with pytest.raises(AssertionError, match="is wrong: error"):
        harness.measure(None, operation(ours), "forward", "ours")


def test_low_precision_is_judged_by_what_plain_pytorch_shows_in_it() -> None:
    assert_correct(good, plain, make_inputs, 0.0, CPU, torch.bfloat16)


def test_a_variant_that_cannot_run_is_skipped_with_the_reason() -> None:
    with pytest.raises(pytest.skip.Exception, match="no variant flash"):
        harness.choose(operation(good), "flash")


def test_a_budget_that_is_spent_skips_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "settings", harness.Settings(budget=0.0))
    with pytest.raises(pytest.skip.Exception, match="budget of 0 s is spent"):
        harness.measure(None, operation(good), "forward", "ours")


def test_files_with_gpu_tests_are_found_and_others_left_alone() -> None:
    found = gpu.gpu_tests()
    assert "tests/models/test_lmim_cuda.py" in found
    assert "tests/data/test_pipeline_cuda.py" in found
    assert "tests/ops/test_philox.py" not in found
    assert "tests/benchmarks/test_harness.py" not in found


def test_a_red_part_of_the_gpu_run_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    parts = [
        gpu.Part("tests", python("print('one failed'); exit(1)"), "tests.txt", 60),
        gpu.Part("ops", python("import time; time.sleep(60)"), "ops.txt", 1),
        gpu.Part("step", python("import sys; print('{}'); print('log', file=sys.stderr)"), "step.json", 60),
    ]
    monkeypatch.setattr(gpu, "parts", lambda results: parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path)])
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main clears it: put back at the end
    assert gpu.main() == 1
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert summary[0].startswith("GPU X, torch ")
    assert [line.split(",")[0] for line in summary[1:]] == [
        "tests: RED (1)",
        "ops: RED (stopped after 1 s)",
        "step: ok",
    ]
    assert capsys.readouterr().out.splitlines() == summary[1:]
    assert (tmp_path / "step.json").read_text() == "{}\n"
    assert (tmp_path / "step.txt").read_text() == "log\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_gpu_run_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path / "results")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("make gpu needs a CUDA device")
    assert not (tmp_path / "results").exists()
