"""Residual add with LayerNorm, bias with GELU, and the linear that makes its input again."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops.gelu import bias_gelu
from lmim_fast.ops.linear import compute_dtype, linear, linear_recomputing
from lmim_fast.ops.norm import dropout_add_layer_norm, layer_norm


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_add_layer_norm_is_add_then_layer_norm() -> None:
    x, bias, residual, weight, shift = double(5, 7), double(7), double(5, 7), double(7), double(7)
    normalised, total = dropout_add_layer_norm(x, bias, residual, weight, shift, eps=1e-6)
    torch.testing.assert_close(total, residual + x + bias)
    torch.testing.assert_close(normalised, F.layer_norm(residual + x + bias, (7,), weight, shift, 1e-6))
    assert torch.autograd.gradcheck(
        partial(dropout_add_layer_norm, eps=1e-6), (x, bias, residual, weight, shift)
    )


def test_residual_keeps_its_type_and_statistics_are_fp32() -> None:
    x, residual = torch.randn(4, 64, dtype=torch.bfloat16), 300 + torch.randn(4, 64)
    weight, bias = torch.ones(64), torch.zeros(64)
    normalised, total = dropout_add_layer_norm(x, None, residual, weight, bias)
    assert (normalised.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    truth = F.layer_norm(residual.double() + x.double(), (64,), eps=1e-6)
    torch.testing.assert_close(normalised.double(), truth, rtol=2**-8, atol=1e-3)


def test_dropout_is_applied_to_the_branch_with_its_bias() -> None:
    x, bias, residual = torch.zeros(1, 4000), torch.ones(4000), torch.full((1, 4000), 5.0)
    _, total = dropout_add_layer_norm(x, bias, residual, torch.ones(4000), torch.zeros(4000), p=0.25)
    assert total.unique().tolist() == pytest.approx([5.0, 5 + 1 / 0.75])
    assert (total == 5.0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_bias_gelu_is_exact_gelu_of_the_sum() -> None:
    x, bias = double(5, 7), double(7)
    truth = 0.5 * (x + bias) * (1 + torch.erf((x + bias) / 2**0.5))
    torch.testing.assert_close(bias_gelu(x, bias), truth)
    assert torch.autograd.gradcheck(bias_gelu, (x, bias))


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_recomputing_linear_equals_linear(shape: tuple[int, ...]) -> None:
    hidden, bias, weight = double(*shape), double(5), double(4, 5)
    upstream = torch.randn(*shape[:-1], 4, dtype=torch.float64)
    plain = linear(bias_gelu(hidden, bias), weight)
    ours = linear_recomputing(bias_gelu(hidden, bias), weight, bias_gelu, hidden, bias)
    assert torch.equal(ours, plain)
    expected = torch.autograd.grad(plain, (hidden, bias, weight), upstream)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (hidden, bias, weight), upstream), expected, strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_recomputing_linear_does_not_keep_its_input() -> None:
    hidden, bias, weight = torch.randn(64, 32, requires_grad=True), torch.zeros(32), torch.randn(8, 32)
    kept: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        activated = bias_gelu(hidden, bias)
        linear_recomputing(activated, weight.requires_grad_(), bias_gelu, hidden, bias)
    assert hidden.untyped_storage().data_ptr() in kept
    assert activated.untyped_storage().data_ptr() not in kept


def test_compute_dtype_is_autocast_or_the_weights() -> None:
    weight = torch.zeros(2, 2)
    assert compute_dtype(weight) == torch.float32
    assert compute_dtype(weight.bfloat16()) == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(weight) == torch.bfloat16


def test_wrong_inputs_are_named() -> None:
    weight = torch.ones(4)
    with pytest.raises(ValueError, match=r"x \(2, 4\) and residual \(3, 4\)"):
        dropout_add_layer_norm(torch.ones(2, 4), None, torch.ones(3, 4), weight, weight)
    with pytest.raises(ValueError, match=r"\[0, 1\), got -0.1"):
        dropout_add_layer_norm(torch.ones(2, 4), None, torch.ones(2, 4), weight, weight, p=-0.1)
    with pytest.raises(ValueError, match=r"must be \(5,\)"):
        layer_norm(torch.ones(2, 5), weight, weight, torch.float32)
    with pytest.raises(ValueError, match=r"bias \(4,\) must be \(5,\)"):
        bias_gelu(torch.ones(2, 5), weight)
