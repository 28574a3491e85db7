"""Large fp32 products on a CPU, which run as convolutions: the same numbers, and where they do."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops.linear import linear, linear_recomputing, shared_input_linears
from lmim_fast.ops.mlp import gelu_linear

ROWS, WIDTH, OUT = 320, 128, 192


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def convolution() -> Iterator[mock.Mock]:
    with mock.patch.object(F, "conv2d", wraps=F.conv2d) as called:
        yield called


def inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (*shape, WIDTH), weight (OUT, WIDTH), upstream gradient; sums of WIDTH products are of order 1."""
    x = torch.randn(*shape, WIDTH, requires_grad=True)
    weight = (torch.randn(OUT, WIDTH) * WIDTH**-0.5).requires_grad_()
    return x, weight, torch.randn(*shape, OUT)


def assert_same(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())


@pytest.mark.parametrize("shape", [(ROWS,), (4, ROWS // 4)])
def test_values_and_gradients_are_those_of_a_product(shape: tuple[int, ...], convolution: mock.Mock) -> None:
    x, weight, upstream = inputs(*shape)
    high = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    truth = high[0] @ high[1].T
    expected = torch.autograd.grad(truth, high, upstream.double())
    forms = (
        lambda: linear(x, weight),
        lambda: shared_input_linears(x, [weight])[0],
        lambda: linear_recomputing(x * 1, weight, lambda x: x * 1, x),
    )
    for form in forms:
        product = form()
        assert_same(product, truth)
        assert product.is_contiguous()
        grads = torch.autograd.grad(product, [x, weight], upstream, allow_unused=True)
        assert_same(grads[1], expected[1])
        assert_same(grads[0], expected[0])
    assert convolution.call_count == len(forms)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted: int) -> None:
    pair, upstream = inputs(ROWS)[:2], inputs(ROWS)[2]
    pair[1 - wanted].requires_grad_(False)
    product = linear(*pair)
    (mine,) = torch.autograd.grad(product, [pair[wanted]], upstream)
    (theirs,) = torch.autograd.grad(F.linear(*pair), [pair[wanted]], upstream)
    torch.testing.assert_close(mine, theirs)


def test_the_product_may_be_taken_over(convolution: mock.Mock) -> None:
    x, first, _ = inputs(ROWS)
    bias, second = torch.randn(OUT, requires_grad=True), torch.randn(WIDTH, OUT, requires_grad=True)
    leaves = x, first, bias, second
    expected = F.linear(F.gelu(F.linear(x, first, bias)), second)
    ours = gelu_linear(linear(x, first), bias, second)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6 * theirs.abs().max().item())
    assert convolution.call_count == 2


def test_a_weight_in_any_layout() -> None:
    x, weight, _ = inputs(ROWS)
    assert_same(linear(x, weight.detach().T.contiguous().T), x.detach().double() @ weight.double().T)


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (torch.zeros(255, WIDTH), OUT),
        (torch.zeros(ROWS, 127), OUT),
        (torch.zeros(ROWS, WIDTH), 127),
        (torch.zeros(WIDTH, ROWS).T, OUT),
        (torch.zeros(ROWS, WIDTH, dtype=torch.float64), OUT),
        (torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16), OUT),
    ],
    ids=["few rows", "narrow input", "narrow output", "layout", "fp64", "bf16"],
)
def test_other_products_are_linears(x: Tensor, out: int, convolution: mock.Mock) -> None:
    assert linear(x, torch.zeros(out, x.shape[-1])).shape == (len(x), out)
    assert not convolution.called


def test_without_threads_or_onednn_products_are_linears(convolution: mock.Mock) -> None:
    x, weight, _ = inputs(ROWS)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        linear(x, weight)
    torch.set_num_threads(1)
    linear(x, weight)
    assert not convolution.called


def test_transforms_and_second_derivatives_go_through(convolution: mock.Mock) -> None:
    x, weight, _ = inputs(ROWS)
    loss = lambda weight: linear(x.detach(), weight).pow(3).sum()  # noqa: E731
    (first,) = torch.autograd.grad(loss(weight), weight, create_graph=True)
    assert convolution.called
    (second,) = torch.autograd.grad(first.sum(), weight)
    plain = lambda weight: F.linear(x.detach(), weight).pow(3).sum()  # noqa: E731
    (expected,) = torch.autograd.grad(plain(weight), weight, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), expected.detach())
    (expected,) = torch.autograd.grad(expected.sum(), weight)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-3)


def test_compiled_products_are_left_to_the_compiler(convolution: mock.Mock) -> None:
    x, weight, _ = inputs(ROWS)
    torch.compiler.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert not convolution.called


def test_the_same_product_has_the_same_bits() -> None:
    x, weight, _ = inputs(ROWS)
    first = linear(x, weight)
    assert all(torch.equal(linear(x, weight), first) for _ in range(5))
