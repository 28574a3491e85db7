"""Dropout, residual add and LayerNorm: the eager form, and the kernels against it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import (
    DEVICE,
    DTYPES,
    GRADIENT_FACTOR,
    OUTPUT_FACTOR,
    assert_as_accurate,
    assert_rms_as_accurate,
    every_second,
)
from torch import Tensor

from lmim_fast.ops import dispatch
from lmim_fast.ops.norm import dropout_add_layer_norm, layer_norm

SEED = 2**40 + 77
Result = tuple[list[Tensor], list[Tensor]]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def seed() -> Tensor:
    return torch.tensor([SEED], device=DEVICE)


def example(*shape: int, dtype: torch.dtype, residual: torch.dtype) -> list[Tensor]:
    """x, x_bias, residual, weight, bias; parameters are fp32 as under autocast."""
    width = shape[-1]
    x, stream = draw(*shape, dtype=dtype), draw(*shape, dtype=residual)
    return [x, draw(width), stream, 1 + draw(width), draw(width)]


def differentiate(
    backend: str,
    form: Callable[..., Any],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    **options: Any,
) -> Result:
    """Outputs and the gradients of all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with dispatch.backend(backend):
        outputs = form(*leaves, **options)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return outputs, list(torch.autograd.grad(outputs, leaves, list(upstream)))


def assert_kernel_is_accurate(
    form: Callable[..., Any], inputs: Sequence[Tensor], upstream: Sequence[Tensor], **options: Any
) -> None:
    """Inputs of one dimension are parameters: their gradients are sums over the rows."""
    exact = partial(differentiate, "eager", form)
    truth = exact([t.double() for t in inputs], [t.double() for t in upstream], **options)
    low = differentiate("eager", form, inputs, upstream, **options)
    ours = differentiate("triton", form, inputs, upstream, **options)
    assert_as_accurate(ours[0], low[0], truth[0], OUTPUT_FACTOR)
    for parameters, check in ((False, assert_as_accurate), (True, assert_rms_as_accurate)):
        chosen = [i for i, tensor in enumerate(inputs) if (tensor.dim() == 1) == parameters]
        check(*([result[1][i] for i in chosen] for result in (ours, low, truth)), GRADIENT_FACTOR)


def test_add_layer_norm_is_add_then_layer_norm() -> None:
    x, bias, residual, weight, shift = double(5, 7), double(7), double(5, 7), double(7), double(7)
    normalised, total = dropout_add_layer_norm(x, bias, residual, weight, shift, eps=1e-6)
    torch.testing.assert_close(total, residual + x + bias)
    torch.testing.assert_close(normalised, F.layer_norm(residual + x + bias, (7,), weight, shift, 1e-6))
    for p in (0.0, 0.4):
        form = partial(dropout_add_layer_norm, p=p, seed=torch.tensor([3]), eps=1e-6)
        assert torch.autograd.gradcheck(form, (x, bias, residual, weight, shift))


def test_residual_keeps_its_type_and_statistics_are_fp32() -> None:
    x, residual = torch.randn(4, 64, dtype=torch.bfloat16), 300 + torch.randn(4, 64)
    weight, bias = torch.ones(64), torch.zeros(64)
    normalised, total = dropout_add_layer_norm(x, None, residual, weight, bias)
    assert (normalised.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    truth = F.layer_norm(residual.double() + x.double(), (64,), eps=1e-6)
    torch.testing.assert_close(normalised.double(), truth, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_dropout_is_applied_to_the_branch_with_its_bias(backend: str) -> None:
    x, bias, residual = torch.zeros(4, 1000), torch.ones(1000), torch.full((4, 1000), 5.0)
    inputs = [tensor.to(DEVICE) for tensor in (x, bias, residual, torch.ones(1000), torch.zeros(1000))]
    with dispatch.backend(backend):
        first, again = (dropout_add_layer_norm(*inputs, p=0.25)[1].cpu() for _ in range(2))
    assert first.unique().tolist() == pytest.approx([5.0, 5 + 1 / 0.75])
    assert (first == 5.0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(first, again)


SHAPES = [(13, 7), (3, 16), (17, 100), (9, 1), (2, 3, 384), (33, 512), (2, 1100)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype"), every_second([[*shape] for shape in SHAPES], DTYPES))
def test_kernel_is_as_accurate_as_the_eager_form(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for residual in {dtype, torch.float32}:
        inputs = example(*shape, dtype=dtype, residual=residual)
        upstream = draw(*shape, dtype=dtype), draw(*shape, dtype=residual)
        assert_kernel_is_accurate(dropout_add_layer_norm, inputs, upstream)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (2, 9, 100), (5, 512)])
def test_kernel_and_eager_form_drop_the_same_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = example(*shape, dtype=dtype, residual=torch.float32)
    upstream = draw(*shape, dtype=dtype), draw(*shape)
    assert_kernel_is_accurate(dropout_add_layer_norm, inputs, upstream, p=0.3, seed=seed())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 40])
def test_layer_norm_kernel_is_as_accurate_as_the_eager_form(rows: int, dtype: torch.dtype) -> None:
    inputs = [draw(rows, 100, dtype=dtype), 1 + draw(100), draw(100)]

    def form(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, weight, bias, x.dtype)

    assert_kernel_is_accurate(form, inputs, [draw(rows, 100, dtype=dtype)])


@pytest.mark.usefixtures("kernels")
def test_layer_norm_of_the_new_residual_makes_the_normalised_rows_again() -> None:
    inputs = example(9, 100, dtype=torch.float16, residual=torch.float32)
    normalised, total = dropout_add_layer_norm(*inputs)
    again = layer_norm(total, *inputs[3:], torch.float16)
    assert again.dtype == torch.float16
    torch.testing.assert_close(again, normalised)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_row_does_not_depend_on_the_rows_after_it(rows: int, p: float) -> None:
    inputs = example(64, 100, dtype=torch.float16, residual=torch.float32)
    upstream = [draw(64, 100, dtype=torch.float16), draw(64, 100)]
    options = dict(p=p, seed=seed())
    outputs, gradients = differentiate("triton", dropout_add_layer_norm, inputs, upstream, **options)
    first = [tensor[:rows] if tensor.dim() == 2 else tensor for tensor in inputs]
    alone = differentiate(
        "triton", dropout_add_layer_norm, first, [tensor[:rows] for tensor in upstream], **options
    )
    for mine, other in zip(alone[0] + alone[1], outputs + gradients, strict=True):
        if other.dim() == 2:
            assert torch.equal(mine, other[:rows])


@pytest.mark.usefixtures("kernels")
def test_statistics_survive_a_large_mean() -> None:
    x, weight, bias = 300 + draw(4, 100), torch.ones(100, device=DEVICE), torch.zeros(100, device=DEVICE)
    truth = F.layer_norm(x.double(), (100,), eps=1e-6)
    torch.testing.assert_close(layer_norm(x, weight, bias, torch.float32).double(), truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_go_unused(used: int, p: float) -> None:
    """Post-norm ignores the new residual; the gradient of the other output is then missing."""
    inputs = example(10, 20, dtype=torch.float32, residual=torch.float32)
    upstream = draw(10, 20)
    results = []
    for backend in ("eager", "triton"):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        with dispatch.backend(backend):
            output = dropout_add_layer_norm(*leaves, p=p, seed=seed())[used]
            results.append(torch.autograd.grad(output, leaves, upstream, allow_unused=True))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("wanted", "p"), every_second([[0], [1], [2], [3], [4], [0, 2], [1, 4]], [0.0, 0.3]))
def test_gradients_of_some_inputs_are_those_of_all(wanted: list[int], p: float) -> None:
    inputs = example(5, 20, dtype=torch.float16, residual=torch.float16)
    upstream = [draw(5, 20, dtype=torch.float16) for _ in range(2)]
    options = dict(p=p, seed=seed())
    everything = differentiate("triton", dropout_add_layer_norm, inputs, upstream, **options)[1]
    leaves = [tensor.detach().requires_grad_(i in wanted) for i, tensor in enumerate(inputs)]
    with dispatch.backend("triton"):
        outputs = dropout_add_layer_norm(*leaves, **options)
        torch.autograd.backward(outputs, upstream)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, everything[i])


@pytest.mark.usefixtures("kernels")
def test_the_one_gradient_of_branch_and_residual_can_be_changed_in_one_of_them() -> None:
    inputs = example(5, 20, dtype=torch.float32, residual=torch.float32)
    x, residual = inputs[0].requires_grad_(), inputs[2].requires_grad_()
    normalised, total = dropout_add_layer_norm(*inputs)
    (normalised.square().sum() + total.square().sum()).backward()
    assert x.grad is not None
    assert residual.grad is not None
    assert torch.equal(x.grad, residual.grad)
    x.grad.zero_()
    assert residual.grad.abs().sum() > 0


@pytest.mark.usefixtures("kernels")
def test_strides_of_inputs_and_gradients_do_not_matter() -> None:
    wide, weight, bias = draw(6, 64), 1 + draw(20), draw(20)
    views = [wide[:, 3:23], draw(40)[::2], draw(20, 6).t(), weight, bias]
    upstream = [draw(1, 1).expand(6, 20), draw(1, 20).expand(6, 20)]
    ours = differentiate("triton", dropout_add_layer_norm, views, upstream)
    theirs = differentiate(
        "triton", dropout_add_layer_norm, [t.contiguous() for t in views], [t.contiguous() for t in upstream]
    )
    for mine, other in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.usefixtures("kernels")
def test_summed_outputs_give_their_expanded_gradients() -> None:
    inputs = example(6, 20, dtype=torch.float32, residual=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    normalised, total = dropout_add_layer_norm(*leaves)
    (normalised.sum() + total.sum()).backward()
    torch.testing.assert_close(leaves[4].grad, torch.full((20,), 6.0, device=DEVICE))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_two_runs_give_the_same_bits(p: float) -> None:
    inputs = example(70, 100, dtype=torch.float16, residual=torch.float32)
    upstream = draw(70, 100, dtype=torch.float16), draw(70, 100)
    runs = [
        differentiate("triton", dropout_add_layer_norm, inputs, upstream, p=p, seed=seed()) for _ in range(2)
    ]
    for first, second in zip(*(outputs + gradients for outputs, gradients in runs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_no_rows_give_no_rows_and_zero_gradients_of_parameters(backend: str) -> None:
    inputs = example(0, 20, dtype=torch.float32, residual=torch.float32)
    for options in ({}, {"p": 0.3, "seed": seed()}):
        outputs, gradients = differentiate(
            backend, dropout_add_layer_norm, inputs, [draw(0, 20), draw(0, 20)], **options
        )
        assert [tuple(tensor.shape) for tensor in outputs] == [(0, 20)] * 2
        assert [tuple(tensor.shape) for tensor in gradients] == [tuple(tensor.shape) for tensor in inputs]
        assert all(tensor.abs().sum() == 0 for tensor in gradients)


def test_custom_ops_keep_the_rules_of_torch() -> None:
    x, x_bias, residual, weight, bias = (
        tensor.requires_grad_() for tensor in example(3, 20, dtype=torch.float16, residual=torch.float32)
    )
    forward = torch.ops.lmim_fast.dropout_add_layer_norm.default
    half = torch.float16
    torch.library.opcheck(forward, (x, x_bias, residual, weight, bias, seed(), 0.3, half, 1e-6))
    torch.library.opcheck(forward, (x, None, x, weight, bias, None, 0.0, half, 1e-6))
    torch.library.opcheck(forward, (None, None, residual, weight, bias, None, 0.0, half, 1e-6))
    backward = torch.ops.lmim_fast.dropout_add_layer_norm_backward.default
    statistics = torch.rand(2, 3, device=DEVICE)
    given = x.detach(), residual.detach(), residual.detach(), weight.detach(), statistics
    torch.library.opcheck(backward, (*given, seed(), 0.3, half, torch.float32, True, True))
    torch.library.opcheck(backward, (None, *given[1:], None, 0.0, None, torch.float32, False, False))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiles_as_one_graph(backend: str) -> None:
    inputs = example(6, 20, dtype=torch.float32, residual=torch.float32)

    def form(*tensors: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
        normalised, total = dropout_add_layer_norm(*tensors, p=p, seed=seed)
        return layer_norm(normalised, *tensors[3:], torch.float32), total

    upstream = [draw(6, 20), draw(6, 20)]
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    ours = differentiate(backend, compiled, inputs, upstream, p=0.3, seed=seed())
    plain = differentiate(backend, form, inputs, upstream, p=0.3, seed=seed())
    for mine, other in zip(ours[0] + ours[1], plain[0] + plain[1], strict=True):
        torch.testing.assert_close(mine, other)


def test_wrong_inputs_are_named() -> None:
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"x \(2, 4\) and residual \(3, 4\)"):
        dropout_add_layer_norm(x, None, torch.ones(3, 4), weight, weight)
    with pytest.raises(ValueError, match=r"\[0, 1\), got -0.1"):
        dropout_add_layer_norm(x, None, x, weight, weight, p=-0.1)
    with pytest.raises(ValueError, match=r"one int64, got torch.int64 of shape \(2,\)"):
        dropout_add_layer_norm(x, None, x, weight, weight, p=0.1, seed=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"x_bias \(5,\) must be \(4,\)"):
        dropout_add_layer_norm(x, torch.ones(5), x, weight, weight)
    with pytest.raises(ValueError, match=r"weight \(4,\) must be \(5,\)"):
        layer_norm(torch.ones(2, 5), weight, weight, torch.float32)
    with pytest.raises(ValueError, match=r"residual must be floating-point, got torch.int64"):
        dropout_add_layer_norm(x, None, x.long(), weight, weight)
    with pytest.raises(ValueError, match=r"dtype must be floating-point, got torch.int32"):
        layer_norm(x, weight, weight, torch.int32)
    with pytest.raises(ValueError, match=r"one device, got .*residual on meta"):
        dropout_add_layer_norm(x, None, x.to("meta"), weight, weight)


@pytest.mark.usefixtures("kernels")
def test_rows_that_are_too_wide_are_refused_by_the_kernel() -> None:
    wide, weight = draw(1, 2049), draw(2049)
    with pytest.raises(RuntimeError, match="1 to 2048 values, got 2049"):
        layer_norm(wide, weight, weight, torch.float32)
    with pytest.raises(RuntimeError, match=r"no kernel for results in torch\.float64"):
        layer_norm(wide[:, :8], weight[:8], weight[:8], torch.float64)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(26624, 384), (131584, 384), (131584, 512), (513, 768), (100, 2048)])
def test_real_sizes_in_bf16(shape: tuple[int, int], residual: torch.dtype) -> None:
    inputs = example(*shape, dtype=torch.bfloat16, residual=residual)
    upstream = draw(*shape, dtype=torch.bfloat16), draw(*shape, dtype=residual)
    assert_kernel_is_accurate(dropout_add_layer_norm, inputs, upstream)
    if shape[1] == 512:
        assert_kernel_is_accurate(dropout_add_layer_norm, inputs, upstream, p=0.1, seed=seed())


@pytest.mark.gpu
def test_cuda_graph_replay_is_equal_and_draws_new_masks() -> None:
    inputs = example(1000, 512, dtype=torch.bfloat16, residual=torch.bfloat16)
    upstream = [draw(1000, 512, dtype=torch.bfloat16) for _ in range(2)]
    plain = differentiate("triton", dropout_add_layer_norm, inputs, upstream)
    differentiate("triton", dropout_add_layer_norm, inputs, upstream, p=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate("triton", dropout_add_layer_norm, inputs, upstream)
        dropped = differentiate("triton", dropout_add_layer_norm, inputs, upstream, p=0.1)[0][1]
    graph.replay()
    first = dropped.clone()
    graph.replay()
    for mine, other in zip(captured[0] + captured[1], plain[0] + plain[1], strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(first, dropped)
