"""The table that chooses between a kernel and the eager form."""

import pytest
import torch
from torch import Tensor

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


def test_auto_takes_the_kernel_where_it_fits(doubled: dispatch.Kernel) -> None:
    assert dispatch.select("doubled", torch.ones(8)) is doubled
    assert dispatch.select("doubled", torch.ones(9)) is None
    assert dispatch.select("doubled", torch.ones(8, dtype=torch.float64)) is None
    assert dispatch.select("another", torch.ones(8)) is None


def test_eager_is_eager(doubled: dispatch.Kernel) -> None:
    with dispatch.backend("eager"):
        assert dispatch.select("doubled", torch.ones(8)) is None
    assert dispatch.select("doubled", torch.ones(8)) is doubled


def test_triton_asked_for_by_name_says_why_not(doubled: dispatch.Kernel) -> None:
    with dispatch.backend("triton"):
        assert dispatch.select("doubled", torch.ones(8)) is doubled
        with pytest.raises(RuntimeError, match="at most 8 values, got 9"):
            dispatch.select("doubled", torch.ones(9))
        with pytest.raises(RuntimeError, match=r"no kernel for torch.float64"):
            dispatch.select("doubled", torch.ones(8, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="another has no kernel"):
            dispatch.select("another", torch.ones(8))


def test_a_cpu_without_the_interpreter_runs_eager(
    doubled: dispatch.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert dispatch.select("doubled", torch.ones(8)) is None


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
