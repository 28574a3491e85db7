"""Bias, GELU and dropout: the eager form, and the kernels against it."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
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

from lmim_fast.kernels.gelu import normal_density, normal_tail
from lmim_fast.ops import dispatch
from lmim_fast.ops.gelu import bias_gelu

SEED = 2**40 + 77


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def seed() -> Tensor:
    return torch.tensor([SEED], device=DEVICE)


def differentiate(backend: str, x: Tensor, bias: Tensor, upstream: Tensor, **options: Any) -> list[Tensor]:
    """The result and the gradients of x and the bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, bias)]
    with dispatch.backend(backend):
        output = bias_gelu(leaves[0], leaves[1], **options)
        return [output, *torch.autograd.grad(output, leaves, upstream)]


def assert_kernel_is_accurate(shape: Sequence[int], dtype: torch.dtype, **options: Any) -> None:
    x, bias, upstream = 2 * draw(*shape, dtype=dtype), draw(shape[-1]), draw(*shape, dtype=dtype)
    truth = differentiate("eager", x.double(), bias.double(), upstream.double(), **options)
    low = differentiate("eager", x, bias, upstream, **options)
    ours = differentiate("triton", x, bias, upstream, **options)
    assert_as_accurate(ours[:1], low[:1], truth[:1], OUTPUT_FACTOR)
    assert_as_accurate(ours[1:2], low[1:2], truth[1:2], GRADIENT_FACTOR)
    assert_rms_as_accurate(ours[2:], low[2:], truth[2:])


@triton.jit
def write_normal(distance_ptr, tail_ptr, density_ptr, EXACT: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    distance = tl.load(distance_ptr + at)
    tl.store(tail_ptr + at, normal_tail(distance, EXACT))
    tl.store(density_ptr + at, normal_density(distance))


def normal(distance: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Tail and density of the kernels at fp32 distances, in fp64."""
    tail, density = torch.empty_like(distance), torch.empty_like(distance)
    write_normal[(1,)](distance, tail, density, exact, distance.numel())
    return tail.double(), density.double()


def test_the_cheap_tail_is_well_within_the_rounding_of_fp16() -> None:
    """Relative error below 8e-6 up to a distance of 6; fp16 rounds by up to 2.4e-4 and more."""
    distance = torch.linspace(0, 6, 2**14, device=DEVICE)
    tail, density = normal(distance, exact=False)
    truth = 0.5 * torch.erfc(distance.double() / math.sqrt(2))
    assert ((tail - truth).abs() / truth).max() < 8e-6
    assert (tail - truth).abs().max() < 2e-6
    true_density = torch.exp(-(distance.double() ** 2) / 2) / math.sqrt(2 * math.pi)
    assert ((density - true_density).abs() / true_density).max() < 5e-6


@pytest.mark.filterwarnings("ignore:overflow")  # of the logarithm, to minus infinity
def test_the_tail_vanishes_far_away_and_never_overflows() -> None:
    distance = torch.logspace(math.log10(6), 37, 1024, device=DEVICE)
    tail, density = normal(distance, exact=False)
    assert (tail >= 0).all()
    assert (tail[1:] <= tail[:-1]).all()
    assert tail[0] < 1.1e-9
    assert (tail[distance > 16] == 0).all()
    assert (density[distance > 16] == 0).all()


def test_the_exact_tail_is_that_of_erf() -> None:
    distance = torch.linspace(0, 8, 2**10, device=DEVICE)
    tail, _ = normal(distance, exact=True)
    assert (tail - 0.5 * torch.erfc(distance.double() / math.sqrt(2))).abs().max() < 1.5e-7


def test_bias_gelu_is_exact_gelu_of_the_sum() -> None:
    x, bias = double(5, 7), double(7)
    truth = 0.5 * (x + bias) * (1 + torch.erf((x + bias) / 2**0.5))
    torch.testing.assert_close(bias_gelu(x, bias), truth)
    for p in (0.0, 0.4):
        assert torch.autograd.gradcheck(partial(bias_gelu, p=p, seed=torch.tensor([3])), (x, bias))


SHAPES = [(1, 100), (13, 7), (3, 16), (17, 100), (9, 1), (2, 3, 384), (40, 512), (3, 1030), (70,)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype"), every_second([[*shape] for shape in SHAPES], DTYPES))
def test_kernel_is_as_accurate_as_the_eager_form(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_kernel_is_accurate(shape, dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (2, 9, 100), (9, 1030)])
def test_kernel_and_eager_form_drop_the_same_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_kernel_is_accurate(shape, dtype, p=0.3, seed=seed())


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_dropout_without_a_seed_is_drawn_anew(backend: str) -> None:
    x, bias = torch.full((4, 1000), 10.0, device=DEVICE), torch.zeros(1000, device=DEVICE)
    with dispatch.backend(backend):
        first, again = (bias_gelu(x, bias, p=0.25).cpu() for _ in range(2))
    assert first.unique().tolist() == pytest.approx([0.0, 10 / 0.75])
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(first, again)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow")
def test_large_values_stay_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest, 100, -100, 0]], dtype=dtype, device=DEVICE).requires_grad_()
    output = bias_gelu(x, torch.zeros(5, device=DEVICE))
    output.backward(torch.ones_like(x))
    assert output.tolist() == [[largest, 0, 100, 0, 0]]
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 0, 1, 0, 0.5]]


@pytest.mark.parametrize("wanted", [0, 1])
def test_the_gradient_of_one_input_is_that_of_both(wanted: int) -> None:
    inputs, upstream = [draw(40, 20), draw(20)], draw(40, 20)
    expected = differentiate("triton", *inputs, upstream)[1 + wanted]
    leaves = [tensor.requires_grad_(i == wanted) for i, tensor in enumerate(inputs)]
    with dispatch.backend("triton"):
        bias_gelu(*leaves).backward(upstream)
    assert leaves[1 - wanted].grad is None
    torch.testing.assert_close(leaves[wanted].grad, expected)


def test_strides_of_inputs_and_gradients_do_not_matter() -> None:
    for x in (draw(6, 64)[:, 3:23], draw(20, 6).t(), draw(6, 1).expand(6, 20)):
        for upstream in (draw(1, 1).expand(6, 20), draw(1, 20).expand(6, 20), draw(6, 32)[:, :20]):
            bias = draw(40)[::2]
            ours = differentiate("triton", x, bias, upstream)
            theirs = differentiate("triton", x.contiguous(), bias.contiguous(), upstream.contiguous())
            for mine, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_two_runs_give_the_same_bits(p: float) -> None:
    given = draw(70, 100, dtype=torch.float16), draw(100), draw(70, 100, dtype=torch.float16)
    first, second = (differentiate("triton", *given, p=p, seed=seed()) for _ in range(2))
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_no_rows_give_no_rows_and_a_zero_gradient_of_the_bias(backend: str) -> None:
    for options in ({}, {"p": 0.3, "seed": seed()}):
        output, grad_x, grad_bias = differentiate(backend, draw(0, 20), draw(20), draw(0, 20), **options)
        assert (output.shape, grad_x.shape) == ((0, 20), (0, 20))
        assert torch.equal(grad_bias, torch.zeros(20, device=DEVICE))


def test_custom_ops_keep_the_rules_of_torch() -> None:
    x, bias = draw(3, 20, dtype=torch.float16).requires_grad_(), draw(20).requires_grad_()
    for given in ((None, 0.0), (seed(), 0.3)):
        torch.library.opcheck(torch.ops.lmim_fast.bias_gelu.default, (x, bias, *given))
        for wanted in (False, True):
            backward = torch.ops.lmim_fast.bias_gelu_backward.default
            torch.library.opcheck(backward, (x.detach(), x.detach(), bias.detach(), *given, wanted))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiles_as_one_graph(backend: str) -> None:
    x, bias, upstream = draw(6, 20).requires_grad_(), draw(20).requires_grad_(), draw(6, 20)
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    with dispatch.backend(backend):
        output = compiled(x, bias, p=0.3, seed=seed())
        ours = [output, *torch.autograd.grad(output, (x, bias), upstream)]
    plain = differentiate(backend, x, bias, upstream, p=0.3, seed=seed())
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other)


def test_wrong_inputs_are_named() -> None:
    x, bias = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"bias \(4,\) must be as wide as x \(2, 5\)"):
        bias_gelu(torch.ones(2, 5), bias)
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
        bias_gelu(x, bias, p=1.0)
    with pytest.raises(ValueError, match=r"one int64, got torch.float32"):
        bias_gelu(x, bias, p=0.1, seed=torch.ones(1))
    with pytest.raises(ValueError, match=r"x must be floating-point, got torch.int64"):
        bias_gelu(x.long(), bias)
    with pytest.raises(ValueError, match=r"bias must be floating-point, got torch.int64"):
        bias_gelu(x, bias.long())
    with pytest.raises(ValueError, match=r"one device, got x on cpu, bias on meta"):
        bias_gelu(x, bias.to("meta"))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(131584, 1536), (131584, 2048), (1000, 3072), (26624, 1536)])
def test_real_sizes_in_bf16(shape: tuple[int, int]) -> None:
    assert_kernel_is_accurate(shape, torch.bfloat16)
    if shape[1] == 2048:
        assert_kernel_is_accurate((8192, 2048), torch.bfloat16, p=0.1, seed=seed())


@pytest.mark.gpu
def test_cuda_graph_replay_is_equal_and_draws_new_masks() -> None:
    half = torch.bfloat16
    given = draw(1000, 1536, dtype=half), draw(1536), draw(1000, 1536, dtype=half)
    plain = differentiate("triton", *given)
    differentiate("triton", *given, p=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = differentiate("triton", *given)
        dropped = differentiate("triton", *given, p=0.1)[0]
    graph.replay()
    first = dropped.clone()
    graph.replay()
    assert all(torch.equal(mine, other) for mine, other in zip(captured, plain, strict=True))
    assert not torch.equal(first, dropped)
