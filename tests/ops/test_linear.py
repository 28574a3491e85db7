"""Linears of one input, and the linear that makes its input again in the backward pass."""

import pytest
import torch
from accuracy import DEVICE
from torch import Tensor

from lmim_fast.ops.gelu import bias_gelu
from lmim_fast.ops.linear import compute_dtype, linear, linear_recomputing, shared_input_linears
from lmim_fast.ops.norm import layer_norm


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 3, 5)])
@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)])
def test_linears_equal_single_ones_whichever_of_them_are_used(
    shape: tuple[int, ...], used: tuple[int, ...]
) -> None:
    x, weights = double(*shape), [double(4, 5), double(7, 5), double(4, 5)]
    wanted = [x, *(weights[number] for number in used)]
    together, apart = shared_input_linears(x, weights), [linear(x, weight) for weight in weights]
    upstream = [torch.randn_like(apart[number]) for number in used]
    found = [
        torch.autograd.grad([products[number] for number in used], wanted, upstream)
        for products in (together, apart)
    ]
    for mine, theirs in zip((*together, *found[0]), (*apart, *found[1]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_linears_take_expanded_gradients_and_frozen_weights() -> None:
    x, first, second = double(2, 3, 5), double(4, 5), double(6, 5).detach()
    products = shared_input_linears(x, [first, second])
    ours = torch.autograd.grad(products[0].sum() + products[1].sum(), (x, first))
    plain = torch.autograd.grad(linear(x, first).sum() + linear(x, second).sum(), (x, first))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not any(product.requires_grad for product in shared_input_linears(x.detach(), [second]))


@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 3, 5)])
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


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("op", ["bias_gelu", "layer_norm"])
def test_kernels_run_again_in_the_backward_pass(op: str) -> None:
    hidden, scale, bias, weight = (torch.randn(s, device=DEVICE) for s in ((6, 20), (20,), (20,), (4, 20)))
    leaves = [tensor.requires_grad_() for tensor in (hidden, scale, bias, weight)]

    def activate(hidden: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if op == "bias_gelu":
            return bias_gelu(hidden, bias)
        return layer_norm(hidden, scale, bias, torch.float32)

    activated = activate(hidden, scale, bias)
    upstream = torch.randn(6, 4, device=DEVICE)
    plain = torch.autograd.grad(
        linear(activated, weight), leaves, upstream, allow_unused=True, retain_graph=True
    )
    product = linear_recomputing(activated, weight, activate, hidden, scale, bias)
    ours = torch.autograd.grad(product, leaves, upstream, allow_unused=True)
    for mine, theirs in zip(ours, plain, strict=True):
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


def test_products_stay_in_the_type_of_x_under_autocast() -> None:
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    plain = torch.autograd.grad(linear(x, weight).sum(), (x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = linear_recomputing(x * 1, weight, lambda x: x * 1, x)
        assert (linear(x, weight).dtype, product.dtype) == (torch.float32, torch.float32)
    product.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, plain[1])


def test_compute_dtype_is_autocast_or_the_weights() -> None:
    weight = torch.zeros(2, 2)
    assert compute_dtype(weight) == torch.float32
    assert compute_dtype(weight.bfloat16()) == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(weight) == torch.bfloat16
