"""The table that chooses between a kernel and the eager form."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lmim_fast.config import preset
from lmim_fast.models.lmim import LMIM
from lmim_fast.ops import dispatch


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> dispatch.Kernel:
    """A kernel for fp32 tensors of up to 8 values, allowed to run on this CPU."""

    def refuses(x: Tensor) -> str | None:
        return None if x.numel() <= 8 else f"takes at most 8 values, got {x.numel()}"

    kernel = dispatch.Kernel(lambda x: 2 * x, (torch.float32,), refuses)
    monkeypatch.setattr(dispatch, "_kernels", {})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.register("doubled", kernel)
    return kernel


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that says it is on a CUDA device, without one."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(*shape, dtype=dtype, device="cuda")


def test_auto_takes_the_kernel_where_it_fits(doubled: dispatch.Kernel) -> None:
    assert dispatch.select("doubled", on_cuda(8)) is doubled
    assert dispatch.select("doubled", on_cuda(9)) is None
    assert dispatch.select("doubled", on_cuda(8, dtype=torch.float64)) is None
    assert dispatch.select("another", on_cuda(8)) is None


def test_auto_on_a_cpu_is_eager_even_in_the_interpreter(doubled: dispatch.Kernel) -> None:
    assert dispatch.select("doubled", torch.ones(8)) is None


def test_run_calls_the_form_that_was_chosen(doubled: dispatch.Kernel) -> None:
    def eager(x: Tensor) -> Tensor:
        return x + 100

    assert dispatch.run("doubled", eager, torch.ones(3)).tolist() == [101.0] * 3
    with dispatch.backend("triton"):
        assert dispatch.run("doubled", eager, torch.ones(3)).tolist() == [2.0] * 3
    with dispatch.backend("eager"):
        assert dispatch.run("doubled", eager, torch.ones(3)).tolist() == [101.0] * 3


def test_bf16_never_reaches_the_interpreter(
    doubled: dispatch.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = dispatch.Kernel(doubled.launch, (torch.bfloat16,), doubled.refuses)
    monkeypatch.setattr(dispatch, "_kernels", {"doubled": kernel})
    with dispatch.backend("triton"), pytest.raises(RuntimeError, match="interpreter"):
        dispatch.select("doubled", torch.ones(8, dtype=torch.bfloat16))


def test_tensors_on_two_devices_are_named() -> None:
    with pytest.raises(ValueError, match="one device, got x on cpu, bias on meta"):
        dispatch.same_device(x=torch.ones(1), none=None, bias=torch.ones(1, device="meta"))


def test_every_op_of_the_model_asks_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def note(op: str, *arguments: object) -> None:
        asked.add(op)

    monkeypatch.setattr(dispatch, "select", note)
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


def test_eager_is_eager(doubled: dispatch.Kernel) -> None:
    with dispatch.backend("eager"):
        assert dispatch.select("doubled", on_cuda(8)) is None
    assert dispatch.select("doubled", on_cuda(8)) is doubled


def test_triton_asked_for_by_name_says_why_not(doubled: dispatch.Kernel) -> None:
    with dispatch.backend("triton"):
        assert dispatch.select("doubled", torch.ones(8)) is doubled
        with pytest.raises(RuntimeError, match="at most 8 values, got 9"):
            dispatch.select("doubled", torch.ones(9))
        with pytest.raises(RuntimeError, match=r"no kernel for torch.float64"):
            dispatch.select("doubled", torch.ones(8, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="another has no kernel"):
            dispatch.select("another", torch.ones(8))


def test_a_cpu_without_the_interpreter_runs_no_kernel(
    doubled: dispatch.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with dispatch.backend("triton"), pytest.raises(RuntimeError, match="cannot run a kernel on cpu"):
        dispatch.select("doubled", torch.ones(8))


def test_environment_and_wrong_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMIM_FAST_BACKEND", "eager")
    assert dispatch.current_backend() == "eager"
    monkeypatch.setenv("LMIM_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda'; choose from auto, eager, triton"):
        dispatch.current_backend()
    with pytest.raises(ValueError, match="'fast'"), dispatch.backend("fast"):
        pass


def test_a_second_kernel_for_an_op_is_refused(doubled: dispatch.Kernel) -> None:
    with pytest.raises(ValueError, match="has a kernel already"):
        dispatch.register("doubled", doubled)
