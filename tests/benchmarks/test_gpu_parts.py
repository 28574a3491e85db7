"""What a stage of the GPU run is made of: the oracle, the profile, products, and what is written when."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from benchmarks import bench_linear, harness, kernel_pass, machine, ops_run, parity, sanitize, step_profile
from benchmarks.machine import Record
from benchmarks.operation import Operation
from lmim_fast.config import preset

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = preset("tiny", depth=2, decoder_depth=1, decoder_dropout=0.0)


def test_a_record_is_written_after_each_figure_and_is_red_from_the_first_failure_on(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    record = Record(path, "ops", CPU, batch=8)
    found = [json.loads(path.read_text())]
    record.add(dict(row=1))
    found.append(json.loads(path.read_text()))
    record.fail("is wrong", tensor=2)
    found.append(json.loads(path.read_text()))
    assert [(len(one["rows"]), one["verdict"]) for one in found] == [
        (0, "unfinished"), (1, "unfinished"), (1, "red"),
    ]  # fmt: skip
    assert found[2]["failed"] == [dict(tensor=2, error="is wrong")]
    assert (found[2]["batch"], found[2]["benchmark"]) == (8, "ops")
    assert record.end() == 1
    good = Record(path, "ops", CPU)
    assert good.end() == 0
    assert json.loads(path.read_text())["verdict"] == "green"


def test_a_copy_that_is_no_checkout_has_the_commit_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.COMMIT, "abc123")
    monkeypatch.delenv(machine.DRY_RUN, raising=False)
    found = machine.describe(CPU)
    assert found["commit"] == "abc123"
    assert "dry_run" not in found
    monkeypatch.setenv(machine.DRY_RUN, "1")
    assert machine.describe(CPU)["dry_run"] is True


def test_clocks_are_read_from_the_device_that_torch_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ntest "$2" = GPU-12ab && echo "1755, 1980, 2619, 431.25, 58"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    properties = types.SimpleNamespace(uuid="12ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = machine.clocks()
    assert found is not None
    assert (found["clocks.sm"], found["clocks.max.sm"], found["power.draw"]) == (1755, 1980, 431.25)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.clocks() is None


def batch_of(count: int) -> parity.Batch:
    images, guidance = (torch.rand(count, 3, *CONFIG.image_size) * 2 - 1 for _ in range(2))
    return images, guidance, torch.rand(count, CONFIG.num_patches)


def test_the_model_in_bf16_is_compared_with_the_oracle_tensor_by_tensor() -> None:
    record = Record(None, "parity", CPU)
    parity.check(CONFIG, batch_of(2), record)
    rows = record.result["rows"]
    assert record.result["failed"] == []
    assert rows[0]["tensor"] == "loss"
    assert len(rows) > 40
    assert all(row["right"] and row["plain_error"] > 0 for row in rows if row["tensor"].endswith("weight"))


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_one_wrong_gradient_is_found_and_named(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model_maeenc.blocks.0.attn.proj.weight"
    measured = parity.loss_and_gradients

    def wrong(model: nn.Module, batch: parity.Batch, *, low: bool) -> dict[str, Tensor]:
        found = measured(model, batch, low=low)
        if isinstance(model, parity.LMIM):
            found[name] *= factor
        return found

    monkeypatch.setattr(parity, "loss_and_gradients", wrong)
    record = Record(None, "parity", CPU)
    parity.check(CONFIG, batch_of(2), record)
    assert [failure["tensor"] for failure in record.result["failed"]] == [name]
    assert record.result["verdict"] == "red"


def test_a_gradient_that_one_model_lacks_is_an_error() -> None:
    loss = dict(loss=torch.ones(()))
    with pytest.raises(ValueError, match=r"one model alone: \['weight'\]"):
        parity.compare(loss, loss, loss | dict(weight=torch.ones(2)), "fp32")


def event(name: str, start: float, end: float, kind: Any = DeviceType.CUDA, **fields: Any) -> Any:
    span = types.SimpleNamespace(start=start, end=end)
    return types.SimpleNamespace(
        name=name, device_type=kind, time_range=span, self_cpu_time_total=1.0, **fields
    )


def test_a_profile_counts_kernels_alone_and_time_in_which_several_run_once() -> None:
    events = [
        event("gemm", 0, 10),
        event("norm", 5, 12),  # on another stream
        event("gemm", 20, 30),
        event("Optimizer.step#AdamW.step", 0, 100),
        event("my range", 0, 100, is_user_annotation=True),
        event("aten::mm", 0, 100, DeviceType.CPU),
        event("Memcpy DtoD", 30, 31),
    ]
    spans = step_profile.spans_of(events, CUDA)
    assert [span.name for span in spans] == ["gemm", "norm", "gemm", "Memcpy DtoD"]
    assert step_profile.busy(spans) == 12 + 11
    first, second, third = step_profile.table(spans, steps=2)
    assert (first["kernel"], first["calls"], first["microseconds"]) == ("gemm", 1.0, 10.0)
    assert (second["kernel"], second["share"]) == ("norm", pytest.approx(7 / 28))
    assert third["calls"] == 0.5


def test_a_profile_without_any_work_on_the_device_is_red(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(step_profile, "spans_of", lambda *arguments: [])
    path = tmp_path / "profile.json"
    arguments = ["--device", "cpu", "--preset", "tiny", "--batch", "1", "--steps", "1"]
    assert step_profile.main([*arguments, "--results", str(path)]) == 1
    assert "saw no work" in json.loads(path.read_text())["failed"][0]["error"]


def test_the_nine_linears_have_the_shapes_of_the_model_and_a_backward_pass_of_two_products() -> None:
    found = list(bench_linear.operations(512))
    assert len(found) == 9 * 3
    assert len({str(operation) for operation in found}) == 9 * 3
    by_rows: dict[int, set[tuple[int, int]]] = {}
    for operation in found:
        sizes = operation.sizes
        rows = sizes["batch"] * sizes["tokens"]
        by_rows.setdefault(rows, set()).add((sizes["inputs"], sizes["outputs"]))
    assert by_rows == {
        158_208: {(384, 1152), (384, 384), (384, 1536), (1536, 384)},
        131_584: {(512, 1536), (512, 512), (512, 1024), (512, 2048), (2048, 512)},
    }
    forward, dgrad, wgrad = (item for item in bench_linear.operations(1) if item.sizes["outputs"] == 1152)
    x, weight = forward.inputs(CPU, torch.float64)
    product = forward.plain(x.requires_grad_(), weight.requires_grad_())
    assert isinstance(product, Tensor)
    grad = torch.randn_like(product)
    product.backward(grad)
    torch.testing.assert_close(dgrad.plain(grad, weight), x.grad)
    torch.testing.assert_close(wgrad.plain(grad, x), weight.grad)
    work = forward.passes(2, False).forward[0]
    assert work.flops == 2 * 309 * 384 * 1152
    assert work.bytes == 2 * (309 * (384 + 1152) + 384 * 1152)


def test_operations_are_timed_in_the_order_of_the_expressions_and_filed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ops.json"
    seen: list[int] = []
    prepared = harness.prepared

    def noted(*arguments: Any) -> harness.Timing:
        seen.append(len(json.loads(path.read_text())["rows"]))
        return prepared(*arguments)

    monkeypatch.setattr(harness, "prepared", noted)
    monkeypatch.setattr(harness, "_ROUNDS", dict(cpu=2, cuda=2))
    only = ["^linear_wgrad ViT-S .* inputs384 outputs384", "^layer_norm"]
    assert ops_run.main(["--results", str(path), "--batch", "1", "--only", *only]) == 0
    found = json.loads(path.read_text())
    rows = [(row["operation"], row["direction"], row["variant"]) for row in found["rows"]]
    assert rows == [
        ("linear_wgrad", "forward", "eager"),
        ("layer_norm", "forward", "ours"),
        ("layer_norm", "forward", "eager"),
        ("layer_norm", "forward+backward", "ours"),
        ("layer_norm", "forward+backward", "eager"),
    ]
    assert seen == [0, 1, 1, 2, 3, 4]  # the second one cannot run on a CPU
    assert [row["variant"] for row in found["skipped"]] == ["fp32 out"]
    assert all(len(row["microseconds"]) == 2 and row["floor_us"] > 0 for row in found["rows"])
    assert set(found["ceilings"]) == {"bandwidth", "flops", "exponentials"}


def test_no_time_of_a_wrong_operation_is_filed_and_the_run_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> harness.Timing:
        raise AssertionError("tensor 0 is wrong: error 1, allowed 0.1")

    monkeypatch.setattr(harness, "prepared", wrong)
    record = Record(None, "ops", CPU, skipped=[])
    ops_run.run(record, list(ops_run.chosen(1, ["^layer_norm"])), ["ours"])
    assert record.result["rows"] == []
    assert [failure["direction"] for failure in record.result["failed"]] == ["forward", "forward+backward"]
    assert ops_run.main(["--batch", "1", "--only", "^no such operation"]) == 1


def test_a_kernel_pass_files_each_operation_and_which_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pass.json"
    seen: list[Any] = []

    def verify(operation: Operation, variant: str) -> list[str]:
        seen.append(json.loads(path.read_text())["running"]["operation"])
        if len(seen) == 2:
            raise torch.AcceleratorError("illegal memory access")
        return []

    monkeypatch.setattr(harness, "verify", verify)
    monkeypatch.setenv(machine.DRY_RUN, "1")
    with pytest.raises(torch.AcceleratorError):
        kernel_pass.main(["--only", "^self_attention decoder", "--batch", "2", "4", "--results", str(path)])
    found = json.loads(path.read_text())
    assert seen == ["self_attention decoder B2 N257", "self_attention decoder B2 N257 p0.1"]
    assert [row["operation"] for row in found["rows"]] == seen[:1]
    assert found["running"]["operation"] == seen[1]
    assert found["failed"][0]["error"] == "AcceleratorError: illegal memory access"


def test_what_a_reported_tool_finds_is_filed_and_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(sanitizer: str, tool: str, *, planted: bool, only: str) -> list[str]:
        name = sanitize.FAULTS[tool].fn.__name__
        text = [kernel_pass.PLANTED, f"========= at {name}"] if planted else ["========= a hazard"]
        return ["sh", "-c", "; ".join(f"echo '{line}'" for line in text) + "; exit 77"]

    monkeypatch.setattr(sanitize, "find", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize, "command", command)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = tmp_path / "sanitize.json"
    arguments = ["--tool", "racecheck", "--results", str(path)]
    assert sanitize.main([*arguments, "--report", "racecheck"]) == 0
    first, second = json.loads(path.read_text())["rows"]
    assert (first["run"], first["verdict"], first["counts"]) == ("racecheck", "RED: found something", False)
    assert first["found"] == ["========= a hazard"]
    assert second["verdict"] == "ok, found the planted fault"
    assert sanitize.main(arguments) == 1
