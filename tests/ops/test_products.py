"""Products of rows and weights, and the copies of weights that they read."""

import contextlib

import pytest
import torch
from accuracy import DEVICE
from torch import nn

from lmim_fast.ops import products
from lmim_fast.ops.linear import linear, linear_recomputing, shared_input_linears
from lmim_fast.ops.products import WeightCopies, in_dtype

LOW = torch.bfloat16


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, device=DEVICE))


def test_copies_are_read_inside_their_block_alone() -> None:
    one, other = weight(6, 4), weight(3, 4)
    copies = WeightCopies([one], LOW)
    copies.refresh()
    with torch.no_grad():
        with copies.read():
            first = in_dtype(one, LOW)
            assert in_dtype(one, LOW) is first
            assert torch.equal(first, one.to(LOW))
            assert in_dtype(one, torch.float16).dtype == torch.float16
            assert in_dtype(one, torch.float32) is one
            assert in_dtype(other, LOW) is not in_dtype(other, LOW)
        assert in_dtype(one, LOW) is not first


@pytest.mark.parametrize("how", ["in place", "data", "new data", "numpy", "fused optimizer"])
def test_a_refresh_sees_every_change_of_a_weight(how: str) -> None:
    one = weight(6, 4)
    copies = WeightCopies([one], LOW)
    copies.refresh()
    with torch.no_grad(), copies.read():
        address = in_dtype(one, LOW).data_ptr()
    if how == "in place":
        with torch.no_grad():
            one.mul_(2.0)
    elif how == "data":
        one.data.copy_(torch.randn(6, 4))
    elif how == "new data":
        one.data = torch.randn(6, 4, device=DEVICE)
    elif how == "numpy" and DEVICE.type == "cpu":
        one.detach().numpy()[:] = 7.0
    elif how == "fused optimizer":
        one.grad = torch.ones_like(one)
        torch.optim.AdamW([one], lr=1.0, fused=True).step()
    copies.refresh()
    with torch.no_grad(), copies.read():
        low = in_dtype(one, LOW)
    assert torch.equal(low, one.detach().to(LOW))
    assert low.data_ptr() == address  # as a graph needs it


def test_a_view_of_a_weight_reads_the_same_view_of_the_copy() -> None:
    whole = weight(6, 4)
    copies = WeightCopies([whole], LOW)
    copies.refresh()
    parts = whole.split([2, 4])
    with torch.no_grad(), copies.read():
        base = in_dtype(whole, LOW)
        for part in (*parts, whole[1:, :3], whole.T):
            low = in_dtype(part, LOW)
            assert torch.equal(low, part.to(LOW))
            assert base.data_ptr() <= low.data_ptr() < base.data_ptr() + 2 * base.numel()


def test_a_weight_that_needs_a_gradient_is_cast_where_autograd_records() -> None:
    one = weight(6, 4)
    with WeightCopies([one], LOW).read():
        cast = in_dtype(one, LOW)
    (grad,) = torch.autograd.grad(cast.sum(), one)
    assert torch.equal(grad, torch.ones_like(one))


@pytest.mark.parametrize("shared", [False, True])
def test_linears_by_copies_have_the_same_bits_and_the_weights_own_gradient(shared: bool) -> None:
    one, x = weight(6, 4), torch.randn(5, 4, device=DEVICE).to(LOW).requires_grad_()
    results = []
    copies = WeightCopies([one], LOW)
    copies.refresh()
    for block in (contextlib.nullcontext(), copies.read()):
        with block:
            product = shared_input_linears(x, [one])[0] if shared else linear(x, one)
        results.append((product, *torch.autograd.grad(product.sum(), (x, one))))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
    assert results[0][2].dtype == torch.float32


@pytest.mark.parametrize("form", ["linear", "shared", "recomputing"])
def test_second_derivatives_of_low_precision_products_hold_the_weight(form: str) -> None:
    one, x = weight(6, 4), torch.randn(5, 4, device=DEVICE).to(LOW).requires_grad_()
    copies = WeightCopies([one], LOW)
    copies.refresh()
    found = []
    for plain in (True, False):
        with copies.read():
            if plain:
                product = torch.nn.functional.linear(x, one.to(LOW))
            elif form == "recomputing":
                product = linear_recomputing(x * 1, one, lambda x: x * 1, x)
            else:
                product = shared_input_linears(x, [one])[0] if form == "shared" else linear(x, one)
        (grad,) = torch.autograd.grad(product.float().square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.float().square().sum(), one)[0])
    assert (found[1] - found[0]).norm() < 0.01 * found[0].norm()


def test_a_compiled_product_casts() -> None:
    one, x = weight(6, 4), torch.randn(5, 4, device=DEVICE).to(LOW)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    copies = WeightCopies([one], LOW)  # of nothing yet
    with copies.read():
        assert torch.equal(compiled(x, one), torch.nn.functional.linear(x, one.to(LOW)))
        (grad,) = torch.autograd.grad(compiled(x, one).sum(), one)
    assert grad.dtype == torch.float32


def test_gradients_of_double_rows_by_single_weights_are_made() -> None:
    one, x = weight(6, 4), torch.randn(5, 4, device=DEVICE, dtype=torch.float64)
    (grad,) = torch.autograd.grad(linear(x, one).sum(), one)
    assert grad.dtype == torch.float32


def test_products_under_autocast_stay_in_the_type_of_their_rows() -> None:
    x, one = torch.randn(5, 4, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    expected = products.matmul(x, one)
    with torch.autocast(DEVICE.type, LOW):
        assert torch.equal(products.matmul(x, one), expected)
        assert products.matmul(x.to(LOW), one.to(LOW)).dtype == LOW
        with products.without_autocast(DEVICE):
            assert (x @ one.T).dtype == torch.float32


@pytest.mark.gpu
def test_weight_gradients_on_a_device_are_not_rounded_to_the_type_of_the_rows() -> None:
    grad, rows = (torch.randn(4096, n, device="cuda").to(LOW) for n in (96, 64))
    exact = grad.double().T @ rows.double()
    full = products.weight_gradient(grad, rows, torch.float32)
    low = products.weight_gradient(grad, rows, LOW)
    assert (full.dtype, low.dtype) == (torch.float32, LOW)
    assert (full - exact).abs().max() < 0.1 * (low - exact).abs().max()
