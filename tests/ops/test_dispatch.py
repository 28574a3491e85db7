"""What chooses between a kernel and the eager form, and how operators are called."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lmim_fast.config import preset
from lmim_fast.kernels import runtime
from lmim_fast.models.lmim import LMIM
from lmim_fast.ops import dispatch
from lmim_fast.ops.operators.operator import direct, function, operator


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("LMIM_FAST_BACKEND", raising=False)


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that says it is on a CUDA device, without one."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(*shape, dtype=dtype, device="cuda")


def takes(*tensors: Tensor | None, reason: str | None = None, results: Sequence[torch.dtype] = ()) -> bool:
    return dispatch.takes("doubled", tensors, reason, *results)


def test_auto_takes_the_kernel_where_it_fits() -> None:
    assert takes(on_cuda(8))
    assert takes(on_cuda(8), None, on_cuda(8, dtype=torch.int64))
    assert not takes(on_cuda(9), reason="takes at most 8 values, got 9")
    assert not takes(on_cuda(8, dtype=torch.float64))
    assert not takes(on_cuda(8), on_cuda(8, dtype=torch.float64))
    assert not takes(on_cuda(8), results=[torch.float64])


def test_auto_on_a_cpu_is_eager_even_in_the_interpreter() -> None:
    assert not takes(torch.ones(8))
    with dispatch.backend("triton"):
        assert takes(torch.ones(8))
        with dispatch.backend("eager"):
            assert not takes(torch.ones(8))
        assert takes(torch.ones(8))


def test_bf16_never_reaches_the_interpreter() -> None:
    for tensors, results in (([torch.ones(8).bfloat16()], []), ([torch.ones(8)], [torch.bfloat16])):
        with dispatch.backend("triton"), pytest.raises(RuntimeError, match="interpreter"):
            takes(*tensors, results=results)


def test_eager_is_eager() -> None:
    with dispatch.backend("eager"):
        assert not takes(on_cuda(8))
    assert takes(on_cuda(8))


def test_triton_asked_for_by_name_says_why_not() -> None:
    with dispatch.backend("triton"):
        with pytest.raises(RuntimeError, match="but doubled takes at most 8 values, got 9"):
            takes(torch.ones(9), reason="takes at most 8 values, got 9")
        with pytest.raises(RuntimeError, match=r"doubled has no kernel for torch.float64"):
            takes(torch.ones(8, dtype=torch.float64))
        with pytest.raises(RuntimeError, match=r"doubled has no kernel for results in torch.float64"):
            takes(torch.ones(8), results=[torch.float64])


def test_a_cpu_without_the_interpreter_runs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with dispatch.backend("triton"), pytest.raises(RuntimeError, match="cannot run a kernel on cpu"):
        takes(torch.ones(8))


def test_kernels_are_recorded_on_a_cpu_in_bf16_without_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with dispatch.backend("triton"), runtime.recording((9, 0)):
        assert takes(torch.ones(8, dtype=torch.bfloat16))


def test_tensors_on_two_devices_are_named() -> None:
    with pytest.raises(ValueError, match="one device, got x on cpu, bias on meta"):
        dispatch.same_device(x=torch.ones(1), none=None, bias=torch.ones(1, device="meta"))


def test_every_op_of_the_model_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def note(op: str, *arguments: object) -> bool:
        asked.add(op)
        return False

    monkeypatch.setattr(dispatch, "takes", note)
    model = LMIM(preset("tiny", depth=1, decoder_depth=1))
    images = torch.rand(1, 3, 32, 128)
    model(images, images)
    assert asked >= {
        "bias_gelu",
        "cross_attention",
        "decoder_tokens",
        "dropout_add_layer_norm",
        "patch_embed",
        "select_patches",
        "self_attention",
    }


def test_environment_and_wrong_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMIM_FAST_BACKEND", "eager")
    assert dispatch.current_backend() == "eager"
    monkeypatch.setenv("LMIM_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda'; choose from auto, eager, triton"):
        dispatch.current_backend()
    with pytest.raises(ValueError, match="'fast'"), dispatch.backend("fast"):
        pass


# --- operators ---


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factor = inputs[1]


@operator(lambda x, factor: torch.empty_like(x), _setup, lambda ctx, grad: (grad * ctx.factor, None))
def tripled_in_tests(x: Tensor, factor: int) -> Tensor:
    """x times a number."""
    return x * factor


def calls_of(run: Any) -> int:
    """How often the operator of torch.library is called."""
    with mock.patch.object(tripled_in_tests, "traced", wraps=tripled_in_tests.traced) as traced:
        run()
    return traced.call_count


def test_a_plain_call_does_not_meet_the_dispatcher_and_has_the_same_gradient() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    assert calls_of(lambda: tripled_in_tests(x, 3)) == 0
    assert torch.autograd.grad(tripled_in_tests(x, 3), x)[0].item() == 3
    assert torch.autograd.grad(tripled_in_tests.traced(x, 3), x)[0].item() == 3
    assert not tripled_in_tests(x.detach(), 3).requires_grad
    with torch.no_grad():
        assert not tripled_in_tests(x, 3).requires_grad


class Tagged(torch.Tensor):
    """A subclass of tensors."""


def test_tracers_modes_and_subclasses_see_the_operator() -> None:
    x = torch.ones(2)
    assert calls_of(lambda: tripled_in_tests(x.as_subclass(Tagged), 3)) == 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert calls_of(lambda: tripled_in_tests(x, 3)) == 1
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: tripled_in_tests(x, 3))(x)
    assert "lmim_fast.tripled_in_tests" in graph.code
    compiled = torch.compile(lambda x: tripled_in_tests(x, 3), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), 3 * x)
    program = torch.export.export(Times(), (x,))
    assert "lmim_fast.tripled_in_tests" in program.graph_module.code
    assert not direct(x, [x, x.as_subclass(Tagged)])
    assert direct(x, [x, None], 1, 0.5, torch.float32)


class Times(torch.nn.Module):
    """The operator as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """3 x."""
        result: Tensor = tripled_in_tests(x, 3)
        return result


def test_a_second_derivative_of_a_plain_call_is_an_error() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="for create_graph run the forward pass"):
        torch.autograd.grad(tripled_in_tests(x, 3).square(), x, create_graph=True)


def test_a_result_that_nobody_reads_gets_no_gradient() -> None:
    asked: list[bool] = []

    def differentiate(ctx: Any, first: Tensor | None, second: Tensor | None) -> tuple[Tensor | None]:
        asked.append(second is None)
        return (first,)

    split = function("split", lambda x: (x * 1, x * 2), lambda ctx, inputs, output: None, differentiate).apply
    x = torch.ones(2, requires_grad=True)
    split(x)[0].sum().backward()
    assert asked == [True]
