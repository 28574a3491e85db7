"""The benchmark of `accelerate`: it measures, it names what is absent, and it fails where a value is off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_accelerate
from benchmarks.accelerated import device, times, values
from benchmarks.accelerated.models import MODELS, SIZES
from benchmarks.tables_accelerate import accelerated
from lmim_fast.layers.accelerate import AccelerationReport, accelerate

NAME = "torch encoder, post-norm, gelu"
MACHINE: dict[str, Any] = {
    **{"device": "cpu", "cores": 1, "threads": 1, "versions": {}, "commit": None},
    **{"models": {}, "absent": {}, "failed": []},
}


def absent(size: object, random: bool) -> Any:
    raise ImportError("no such library")


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_values_hold_and_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "absent", absent)
    path = tmp_path / "result.json"
    arguments = ["--only", "values", "--models", NAME, "absent", "--results", str(path)]
    assert bench_accelerate.main(arguments) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["absent"] == {"absent": "no such library"}
    assert result["models"][NAME]["swapped"]["torch.nn.modules.transformer.TransformerEncoderLayer"] == 2
    table = capsys.readouterr().out
    assert "TransformerEncoderLayer x 2" in table
    assert "- absent: no such library" in table


def test_a_wrong_fast_form_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> AccelerationReport:
        report = accelerate(model)
        norm = report.swapped[-1].module
        norm.register_forward_hook(lambda module, inputs, out: 1.01 * out)
        return report

    monkeypatch.setattr(values, "accelerate", wrong)
    failed = bench_accelerate.measure(("values",), [NAME], rounds=1)["failed"]
    assert any("fp64, train: output" in each for each in failed)
    assert any("undo leaves another output" in each for each in failed)


def test_a_slower_model_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(model: nn.Module) -> None:
        forward = model.forward

        def twice(x: Tensor) -> Tensor:
            forward(x)
            out: Tensor = forward(x)
            return out

        model.forward = twice  # type: ignore[method-assign]

    monkeypatch.setattr(times, "accelerate", slower)
    rows = times.measure(NAME, "small", rounds=1)
    assert all(row["ratio"] < 0.8 for row in rows)
    result = {"benchmark": "accelerate", "models": {NAME: {"times": rows}}, "absent": {}}
    assert len(bench_accelerate.failures(result)) == 2


def test_a_call_that_is_left_to_the_own_forward_is_counted_with_the_reason() -> None:
    found = values.compare("torch encoder, pre-norm, gelu, padding", SIZES["tiny"])["own_forward"]
    assert any(key.startswith("torch.nn.modules.transformer.TransformerEncoderLayer: ") for key in found)
    assert all(reason for reason in found)


def test_wrappers_are_rendered() -> None:
    row = {"model": NAME, "wrapper": "w", "order": "o"}
    fast = {"runs": "fast", "output": 0.0, "gradient": 0.0, "warnings": ["?"]}
    shown = accelerated(MACHINE | {"wrappers": [row | fast, row | {"refused": "TypeError: no"}]})
    assert "| w | o | refuses: TypeError: no |" in shown
    shown = accelerated(MACHINE | {"wrappers": [row | fast]})
    assert "| w | o | fast (0e+00); ? |" in shown


def test_a_model_on_a_device_is_timed_in_four_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)  # which would take seconds
    rows = device.measure(NAME, rounds=1, size="tiny", device="cpu")
    assert [row["direction"] for row in rows] == ["forward", "both"]
    assert all(set(row["ratio"]) == set(device.FORMS) for row in rows)
    shown = accelerated(MACHINE | {"models": {NAME: {"device": rows}}})
    assert "| accelerated, compiled |" in shown
