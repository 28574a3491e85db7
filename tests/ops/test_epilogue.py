"""The setting that chooses where the GELU of an MLP runs."""

from __future__ import annotations

import pytest
import torch
from accuracy import CUDA, interpreted
from test_dispatch import on_cuda
from torch import Tensor

from benchmarks.operation import launches
from lmim_fast.kernels import runtime
from lmim_fast.layers import Block, DecoderLayer, Mlp
from lmim_fast.ops import dispatch, epilogue
from lmim_fast.ops.epilogue import in_epilogue
from lmim_fast.ops.mlp import mlp

WIDTH, HIDDEN = 16, 32
SHAPES = (8, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN)
EPILOGUE = {"linear_gelu.linear_gelu_kernel", "linear_gelu.linear_gelu_backward_kernel"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (epilogue.VARIABLE, "LMIM_FAST_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def on_device(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [on_cuda(*shape, dtype=dtype) for shape in SHAPES]


def on_cpu(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in SHAPES]


@pytest.mark.parametrize(
    ("setting", "environment", "backend", "chosen"),
    [
        ("auto", None, "auto", False),  # nothing is in the table
        ("auto", "auto", "auto", False),
        ("auto", "on", "auto", True),
        ("auto", "off", "auto", False),
        ("on", None, "auto", True),
        ("on", "off", "auto", True),
        ("off", "on", "auto", False),
        ("auto", None, "triton", True),
        ("auto", "off", "triton", False),
        ("off", None, "triton", False),
        ("on", None, "eager", False),
        ("auto", "on", "eager", False),
    ],
)
def test_the_setting_then_the_environment_then_the_backend_choose(
    setting: str, environment: str | None, backend: str, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epilogue, "FASTER", set())
    if environment is not None:
        monkeypatch.setenv(epilogue.VARIABLE, environment)
    with dispatch.backend(backend):
        assert in_epilogue(setting, *on_device()) is chosen
        assert in_epilogue(setting, *on_device(torch.float32)) is chosen


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        (dict(), True),
        (dict(capability=(10, 0)), False),
        (dict(trained=True), False),
        (dict(entry=("forward+backward", (9, 0), WIDTH, HIDDEN)), False),
        (dict(entry=("forward+backward", (9, 0), WIDTH, HIDDEN), trained=True), True),
        (dict(entry=("forward", (9, 0), HIDDEN, WIDTH)), False),
        (dict(dtype=torch.float16), True),
        (dict(dtype=torch.float32), False),
        (dict(out=WIDTH + 1), False),
        (dict(setting="off"), False),
        (dict(backend="eager"), False),
    ],
)
def test_auto_takes_what_the_table_has_for_device_widths_and_direction(
    changes: dict[str, object], chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = dict(
        entry=("forward", (9, 0), WIDTH, HIDDEN), capability=(9, 0), trained=False, dtype=torch.bfloat16
    )
    case |= dict(out=WIDTH, setting="auto", backend="auto") | changes
    monkeypatch.setattr(epilogue, "FASTER", {case["entry"]})
    x, weight1, bias1, weight2 = on_device(case["dtype"])
    weight2 = on_cuda(case["out"], HIDDEN, dtype=case["dtype"])
    weight1.requires_grad_(case["trained"])
    with runtime.recording(case["capability"]), dispatch.backend(case["backend"]):
        assert in_epilogue(case["setting"], x, weight1, bias1, weight2) is chosen
        with torch.no_grad():
            forward = case["entry"][0] == "forward" and (chosen or case["trained"])
            assert in_epilogue(case["setting"], x, weight1, bias1, weight2) is forward


def test_on_says_why_a_device_cannot_run_the_kernel_and_other_settings_take_the_other_form() -> None:
    tensors = on_device(torch.float64)
    with pytest.raises(RuntimeError, match=r"epilogue is 'on', but mlp has no kernel for torch\.float64"):
        in_epilogue("on", *tensors)
    assert not in_epilogue("auto", *tensors)
    assert not in_epilogue("off", *tensors)
    with dispatch.backend("eager"):
        assert not in_epilogue("on", *tensors)


@pytest.mark.skipif(not interpreted(), reason="about a CPU that could run kernels in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_on_is_the_plain_form_on_a_cpu(dtype: torch.dtype) -> None:
    tensors = on_cpu(dtype)
    with launches() as names:
        on, off = (mlp(*tensors, epilogue=setting) for setting in ("on", "off"))
    assert torch.equal(on, off)
    assert names == []


@pytest.mark.skipif(CUDA, reason="a device is no reason to repeat it")
def test_what_runs_is_what_was_chosen_and_dropout_has_no_epilogue() -> None:
    ran = {}
    for setting, p in (("on", 0.0), ("off", 0.0), ("auto", 0.0), ("on", 0.25)):
        with dispatch.backend("triton"), launches() as names:
            mlp(*on_cpu(), p=p, epilogue=setting).sum().backward()
        ran[setting, p] = set(names)
    assert ran["on", 0.0] == ran["auto", 0.0] == EPILOGUE
    assert ran["off", 0.0] == ran["on", 0.25] == {"gelu._forward", "gelu._backward"}


def test_unknown_settings_are_named_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "GELU epilogue 'fast'; choose from auto, on, off"
    with pytest.raises(ValueError, match=message):
        mlp(*on_cpu(), epilogue="fast")
    with pytest.raises(ValueError, match=message):
        Mlp(WIDTH, epilogue="fast")
    with pytest.raises(ValueError, match=message):
        Block(WIDTH, 2, epilogue="fast")
    with pytest.raises(ValueError, match=message):
        DecoderLayer(WIDTH, 2, epilogue="fast")
    monkeypatch.setenv(epilogue.VARIABLE, "fast")
    with pytest.raises(ValueError, match=message):
        mlp(*on_cpu())
    mlp(*on_cpu(), epilogue="off")  # the environment is not asked
