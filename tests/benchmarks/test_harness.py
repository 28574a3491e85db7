"""Benchmarks of operations: what they check, what they write, and when a comparison fails."""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from stopped_clock import StoppedClock
from torch import Tensor

from benchmarks import bench_attention, compare, floors, harness, tables
from benchmarks.correctness import assert_correct
from benchmarks.operation import Operation

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LEFT_OUT = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
NO_PLUGINS = "-p no:hypothesispytest -p no:typeguard"  # which take a second to import
SHORT_GELU = "bias_gelu and ViT-S and N52"


def plain_environment() -> dict[str, str]:
    """Without the interpreter, and without what keeps pytest-benchmark from measuring under xdist."""
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    return kept | {"PYTEST_ADDOPTS": NO_PLUGINS}


def check_rows(path: Path) -> None:
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
    page = tables.render(path.parent)
    assert "| ViT-S B8 N52 D1536 | forward |" in page


def test_a_run_writes_what_it_measured_and_is_compared_with_the_saved_one_which_only_saving_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], cwd: Path, check: bool) -> subprocess.CompletedProcess[str]:
        result = forked.run(*command[1:], cwd=cwd)
        sys.stdout.write(result.stdout)
        sys.stderr.write(result.stderr)
        return result

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "STORAGE", tmp_path / ".benchmarks")
    for name in LEFT_OUT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTEST_ADDOPTS", NO_PLUGINS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
    for name in ("lmim_fast", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "benchmarks").mkdir()
    for file in (ROOT / "benchmarks").glob("*"):
        if not file.match("bench_*") or file.stem == "bench_gelu":  # others take seconds to collect
            (tmp_path / "benchmarks" / file.name).symlink_to(file)
    whole = ["--batches", "8", "-k", f"{SHORT_GELU} and not compiled"]
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "ops.json"
    assert compare.main([*whole, "--results", str(path)]) == 0
    assert "No run on this device yet" in capfd.readouterr().out
    check_rows(path)
    options = ["--batches", "8", "-k", f"ours and {SHORT_GELU} and not backward"]
    (last,) = (tmp_path / ".benchmarks").glob("*/last.json")
    saved = last.read_text()
    assert compare.main([*options, "-p", "slower"]) == 1
    assert "Performance has regressed" in capfd.readouterr().err
    assert last.read_text() == saved
    found = json.loads(saved)
    for one in found["benchmarks"]:
        one["stats"]["median"] *= 100
    last.write_text(slow := json.dumps(found))
    assert compare.main(options) == 0
    assert "which stays" in capfd.readouterr().out
    assert last.read_text() == slow

    def another_run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert not [word for word in command if word.startswith("--benchmark-compare")]
        last.with_name("new.json").write_text("another run")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", another_run)
    assert compare.main([*options, "--save"]) == 0
    assert last.read_text() == "another run"


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


def wrong_without_gradients(x: Tensor, weight: Tensor, seed: Tensor | None = None) -> Tensor:
    return plain(x, weight) * (1 if torch.is_grad_enabled() else 1.001)


@pytest.mark.parametrize(
    "ours", [wrong_by_a_little, wrong_in_one_row, wrong_gradient, wrong_without_gradients]
)
def test_no_speed_is_reported_for_a_wrong_form(ours: Any) -> None:
    with pytest.raises(AssertionError, match="is wrong: error"):
        harness.measure(None, operation(ours), "forward", "ours")


class WrongColumn(torch.autograd.Function):
    """A gradient that is right but for its largest column, which is too large by a tenth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        wrong = grad.clone()
        wrong[grad.abs().argmax()] *= 1.1
        return wrong


def test_one_wrong_column_of_a_gradient_is_found_though_it_is_lost_in_the_mean() -> None:
    def wide_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, weight = torch.randn(16, 2**16, device=device, dtype=dtype), torch.randn(2**16, device=device)
        return x.requires_grad_(), weight.requires_grad_()

    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight.to(x.dtype)

    def wrong_column(x: Tensor, weight: Tensor, seed: Tensor | None = None) -> Tensor:
        return scaled(x, WrongColumn.apply(weight))

    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=r"^largest of tensor 2 is wrong"):
        assert_correct(wrong_column, scaled, wide_inputs, 0.0, CPU, torch.bfloat16)


def test_low_precision_is_judged_by_what_plain_pytorch_shows_in_it() -> None:
    assert_correct(good, plain, make_inputs, 0.0, CPU, torch.bfloat16)


def test_a_variant_that_cannot_run_is_skipped_with_the_reason() -> None:
    with pytest.raises(pytest.skip.Exception, match="no variant flash"):
        harness.measure(None, operation(good), "forward", "flash")


def failing(error: Exception) -> Operation:
    def other(*inputs: Tensor) -> Tensor:
        raise error

    return dataclasses.replace(operation(good), others=dict(other=other))


@pytest.mark.parametrize("variant", ["other", "compiled other"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "CUDA out of memory.$"),
        (RuntimeError(""), "RuntimeError$"),
        (torch.AcceleratorError("not permitted when stream is capturing"), "not permitted"),
    ],
)
def test_a_form_of_others_that_fails_is_skipped_while_the_device_answers(
    error: Exception, reason: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(pytest.skip.Exception, match=f"{variant} does not run this: {reason}"):
        harness.measure(None, failing(error), "forward", variant)


def broken(x: Tensor, weight: Tensor, seed: Tensor | None = None) -> Tensor:
    raise torch.AcceleratorError("illegal memory access")


@pytest.mark.parametrize("variant", ["other", "ours"])
def test_a_device_that_does_not_answer_ends_the_session(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: broken(torch.empty(0), torch.empty(0)))
    bad = dataclasses.replace(operation(broken), others=dict(other=broken))
    with pytest.raises(pytest.exit.Exception, match="beyond use: illegal memory access") as caught:
        harness.measure(None, bad, "forward", variant)
    assert caught.value.returncode == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CUDA device rounds are graphs")
@pytest.mark.parametrize(("seconds", "expected"), [(2**-6, 1), (2**-10, 6), (2**-20, 200)])
def test_a_round_has_the_calls_that_fit_into_it(
    seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, counts = StoppedClock(), list[int]()
    monkeypatch.setattr(harness, "time", clock)

    def call(count: int) -> None:
        counts.append(count)
        clock.sleep(seconds * count)

    calls, repetitions = harness._prepare(call, 1)
    assert repetitions == expected
    calls()
    assert counts == [1, 1, 1, repetitions]


@pytest.mark.parametrize(("values", "copies"), [(2**28, 1), (2**23, 6), (2**15, 64)])
def test_inputs_are_copied_until_they_leave_the_cache_of_a_device_but_tiny_ones_are_not(
    values: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 MiB of fp32 come to six copies of three times 60 MiB."""
    properties = types.SimpleNamespace(L2_cache_size=60 * 2**20)
    monkeypatch.setattr(harness, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    inputs = (torch.empty(values, device="meta"),)
    assert harness._copy_count(dataclasses.replace(operation(good), inputs=lambda *_: inputs)) == copies


def test_results_are_written_while_the_run_goes_on(tmp_path: Path) -> None:
    """The third benchmark kills its process: what the others measured is there."""
    path, plugin = tmp_path / "ops.json", tmp_path / "killer.py"
    plugin.write_text(
        "import os\nfrom benchmarks import conftest, harness\n"
        "conftest._WRITE_SECONDS = 0.0\nmeasure = harness._measure\n"
        "def killed(*arguments):\n"
        "    os._exit(9) if len(harness.rows) == 2 else measure(*arguments)\n"
        "harness._measure = killed\n"
    )
    environment = plain_environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = ["-m", "pytest", "benchmarks/bench_gelu.py", "-p", "killer", "--benchmark-only"]
    command += ["--batches", "8", "-k", SHORT_GELU + " and not compiled", "--results", str(path)]
    result = forked.run(*command, env=environment)
    assert result.returncode == 9
    assert len(json.loads(path.read_text())["rows"]) == 2


def test_results_of_a_round_do_not_share_memory() -> None:
    copies = [harness._copy(operation(good)) for _ in range(3)]
    for direction in harness.DIRECTIONS:
        places: list[int] = []

        def run(*inputs: Tensor, places: list[int] = places) -> Tensor:
            result = plain(*inputs)
            places.append(result.data_ptr())
            return result

        harness._call(run, itertools.cycle(copies), direction, 3, 6)
        assert all(len(set(places[start : start + 3])) == 3 for start in range(4))


def test_rivals_get_the_bias_for_nothing_and_its_gradient_is_a_column_sum() -> None:
    x, bias = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    result, grad = bench_attention._in_product(x, bias), torch.randn(2, 3, 4)
    assert result.data_ptr() == x.data_ptr()
    of_x, of_bias = torch.autograd.grad(result, (x, bias), grad)
    assert torch.equal(of_x, grad)
    torch.testing.assert_close(of_bias, grad.sum((0, 1)))


def test_a_budget_that_is_spent_skips_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "settings", harness.Settings(budget=0.0))
    with pytest.raises(pytest.skip.Exception, match="budget of 0 s is spent"):
        harness.measure(None, operation(good), "forward", "ours")
