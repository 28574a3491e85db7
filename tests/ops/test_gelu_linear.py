"""GELU and the product that reads it as one op: values, gradients, what is kept for the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmim_fast.ops import dispatch
from lmim_fast.ops.gelu import bias_gelu
from lmim_fast.ops.linear import linear, linear_recomputing
from lmim_fast.ops.mlp import gelu_linear

ROWS, WIDTH, HIDDEN, OUT = 12, 3, 8, 5


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def written_out(hidden: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.gelu(hidden + bias), weight)


@pytest.mark.parametrize("shape", [(HIDDEN,), (ROWS, HIDDEN), (2, 3, HIDDEN), (0, HIDDEN)])
def test_values_and_gradients_are_those_of_the_plain_form(shape: tuple[int, ...]) -> None:
    x, first = double(*shape[:-1], WIDTH), double(HIDDEN, WIDTH)
    bias, weight = double(HIDDEN), double(OUT, HIDDEN)
    leaves = x, first, bias, weight
    upstream = torch.randn(*shape[:-1], OUT, dtype=torch.float64)
    expected = written_out(F.linear(x, first), bias, weight)
    ours = gelu_linear(linear(x, first), bias, weight)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_alone(wanted: tuple[int, ...]) -> None:
    inputs = double(ROWS, HIDDEN), double(HIDDEN), double(OUT, HIDDEN)
    for number, tensor in enumerate(inputs):
        tensor.requires_grad_(number in wanted)
    leaves = [inputs[number] for number in wanted]
    expected = torch.autograd.grad(written_out(*inputs).square().sum(), leaves)
    product = gelu_linear(inputs[0] if 0 in wanted else inputs[0].clone(), *inputs[1:])
    for mine, theirs in zip(torch.autograd.grad(product.square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_callers_leaf_is_left_as_it_is() -> None:
    hidden, bias, weight = double(ROWS, HIDDEN), double(HIDDEN), double(OUT, HIDDEN)
    before = hidden.detach().clone()
    gelu_linear(hidden, bias, weight).sum().backward()
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("trained", [False, True])
def test_without_gradients_nothing_new_is_as_large_as_the_hidden_rows(trained: bool) -> None:
    hidden, bias, weight = torch.randn(ROWS, HIDDEN), torch.randn(HIDDEN), torch.randn(OUT, HIDDEN)
    bias.requires_grad_(trained)
    weight.requires_grad_(trained)
    with torch.set_grad_enabled(not trained):
        expected = written_out(hidden, bias, weight)
        assert torch.equal(gelu_linear(hidden, bias, weight), expected)
        assert torch.equal(F.linear(hidden, weight), expected)  # it holds the GELU


def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    x, first = double(ROWS, WIDTH), double(HIDDEN, WIDTH)
    bias, weight = double(HIDDEN), double(OUT, HIDDEN)
    loss = gelu_linear(linear(x, first), bias, weight).square().sum()
    before, after = (torch.autograd.grad(loss, (x, first, bias, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(after, before, strict=True))


def test_a_backward_pass_under_autocast_stays_in_the_type_of_the_products() -> None:
    bias, weight = torch.randn(HIDDEN, requires_grad=True), torch.randn(OUT, HIDDEN, requires_grad=True)
    rows = torch.randn(ROWS, HIDDEN)
    expected = torch.autograd.grad(gelu_linear(rows.clone(), bias, weight).sum(), (bias, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(gelu_linear(rows.clone(), bias, weight).sum(), (bias, weight))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def kept_shapes(compiled: bool, p: float = 0.0) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps of a product, its GELU and the next product."""

    def forward(x: Tensor, first: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return gelu_linear(linear(x, first), bias, weight, p=p)

    shapes: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    sizes = (ROWS, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (OUT, HIDDEN)
    inputs = [torch.randn(size, requires_grad=True) for size in sizes]
    torch.compiler.reset()
    function = torch.compile(forward, backend="aot_eager", fullgraph=True) if compiled else forward
    with dispatch.backend("eager"), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*inputs).sum().backward()
    return shapes


compilers_that_recompute = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.13",
    reason="PyTorch 2.11 takes what it compiles for exported, where nothing is made again",
)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=compilers_that_recompute)])
def test_one_tensor_of_hidden_rows_is_kept(compiled: bool) -> None:
    assert kept_shapes(compiled).count((ROWS, HIDDEN)) == 1


def test_the_counter_sees_the_gelu_where_it_is_kept() -> None:
    assert kept_shapes(False, p=0.5).count((ROWS, HIDDEN)) > 1


@compilers_that_recompute
def test_a_compiled_recomputing_linear_does_not_keep_its_input() -> None:
    def forward(hidden: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        hidden = hidden * 2
        return linear_recomputing(bias_gelu(hidden, bias), weight, bias_gelu, hidden, bias)

    inputs = double(ROWS, HIDDEN), double(HIDDEN), double(OUT, HIDDEN)
    expected = torch.autograd.grad(forward(*inputs).square().sum(), inputs)
    shapes: list[tuple[int, ...]] = []
    torch.compiler.reset()
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (shapes.append(tuple(tensor.shape)), tensor)[1], lambda tensor: tensor
    ):
        product = compiled(*inputs)
    assert shapes.count((ROWS, HIDDEN)) == 1
    for mine, theirs in zip(torch.autograd.grad(product.square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_dropout_drops_hidden_values() -> None:
    hidden, bias = torch.full((400, HIDDEN), 3.0), torch.zeros(HIDDEN)
    product = gelu_linear(hidden, bias, torch.eye(HIDDEN), p=0.25)
    assert (product == 0).double().mean().item() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(HIDDEN + 1), r"bias \(9,\) must be as wide as x \(12, 8\)"),
        (torch.zeros(HIDDEN, dtype=torch.int64), "bias must be floating-point, got torch.int64"),
    ],
)
def test_a_bias_that_does_not_fit_is_named(bias: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gelu_linear(torch.zeros(ROWS, HIDDEN), bias, torch.zeros(OUT, HIDDEN))
