"""Backward pass of the MLP with GELU in its epilogue: what is kept for it, recomputed and left out."""

import pytest
import torch
from accuracy import DEVICE
from test_mlp import as_double, inputs, run
from torch import Tensor

from lmim_fast.kernels import linear_gelu
from lmim_fast.ops.mlp import mlp


def test_backward_makes_the_same_activated_values_again() -> None:
    x, weight1, bias1, weight2 = (tensor.detach() for tensor in inputs(70, 64, 128, 32, torch.float16))
    hidden, activated = linear_gelu.forward(x, weight1, bias1, keep_hidden=True)
    assert hidden is not None
    grad = torch.randn(70, 32, device=DEVICE).half()
    _, again, _ = linear_gelu.backward(grad, weight2, hidden, activated_wanted=True, bias_wanted=False)
    assert again is not None
    assert torch.equal(again, activated)


@pytest.mark.usefixtures("kernels")
def test_hidden_rows_are_kept_for_a_backward_pass_and_activated_rows_never() -> None:
    tensors = inputs(70, 24, 72, 40, torch.float32)
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        mlp(*tensors)
    assert sorted(kept) == [(40, 72), (70, 24), (70, 72), (72,), (72, 24)]
    _, hidden = torch.ops.lmim_fast.mlp(*tensors, True)
    assert not hidden.requires_grad


@pytest.mark.usefixtures("kernels")
def test_hidden_rows_are_written_only_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bool] = []
    forward = linear_gelu.forward

    def note(*arguments: Tensor, keep_hidden: bool) -> tuple[Tensor | None, Tensor]:
        written.append(keep_hidden)
        return forward(*arguments, keep_hidden=keep_hidden)

    monkeypatch.setattr(linear_gelu, "forward", note)
    tensors = inputs(5, 24, 48, 16, torch.float32)
    mlp(*tensors)
    mlp(tensors[0], *(tensor.detach() for tensor in tensors[1:]))
    mlp(*(tensor.detach() for tensor in tensors))
    with torch.no_grad():
        mlp(*tensors)
    assert written == [True, True, False, False]


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_gradients_that_are_not_needed_are_not_made(
    needed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, bool]] = []
    backward = linear_gelu.backward

    def note(*arguments: Tensor, activated_wanted: bool, bias_wanted: bool) -> tuple[Tensor | None, ...]:
        asked.append((activated_wanted, bias_wanted))
        return backward(*arguments, activated_wanted=activated_wanted, bias_wanted=bias_wanted)

    monkeypatch.setattr(linear_gelu, "backward", note)
    tensors = inputs(20, 24, 48, 16, torch.float32)
    for number, tensor in enumerate(tensors):
        tensor.requires_grad_(number in needed)
    upstream = torch.randn(20, 16, device=DEVICE)
    _, ours = run("triton", tensors, upstream)
    _, truth = run("eager", as_double(tensors), upstream)
    for mine, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)
    assert asked == ([] if needed == (3,) else [(3 in needed, 2 in needed)])


@pytest.mark.usefixtures("kernels")
def test_a_result_that_nobody_reads_has_no_gradient() -> None:
    tensors = inputs(5, 24, 48, 16, torch.float32)
    unused = torch.zeros(1, device=DEVICE, requires_grad=True)
    out = mlp(*tensors)
    grads = torch.autograd.grad((out.detach() + unused).sum(), tensors, allow_unused=True)
    assert grads == (None,) * 4


@pytest.mark.parametrize("bias", [torch.float16, torch.float32])
@pytest.mark.parametrize(("bias_wanted", "weight_wanted"), [(True, True), (True, False), (False, True)])
def test_opcheck_of_its_backward(bias_wanted: bool, weight_wanted: bool, bias: torch.dtype) -> None:
    _, _, bias1, weight2 = (tensor.detach() for tensor in inputs(20, 24, 48, 16, torch.float16))
    grad, hidden = torch.randn(20, 16).to(weight2), torch.randn(20, 48).to(weight2)
    arguments = (grad, bias1.to(bias), weight2, hidden, bias_wanted, weight_wanted)
    torch.library.opcheck(torch.ops.lmim_fast.mlp_backward.default, arguments)
