"""MLP with the GELU in the epilogue of its first product: kernel against eager form."""

from collections.abc import Sequence

import pytest
import torch
from accuracy import (
    CUDA,
    DEVICE,
    DTYPES,
    GRADIENT_FACTOR,
    OUTPUT_FACTOR,
    assert_as_accurate,
    assert_rms_as_accurate,
    every_second,
)
from torch import Tensor

from lmim_fast.kernels import linear_gelu
from lmim_fast.ops import dispatch
from lmim_fast.ops.mlp import mlp

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(rows: int, width: int, hidden: int, out: int, dtype: torch.dtype, *, parameters=None) -> Inputs:
    """x, weight1, bias1, weight2, such that hidden values and results are of the order of 1."""
    shapes = ((rows, width), (hidden, width), (hidden,), (out, hidden))
    scales = (1.0, width**-0.5, 1.0, hidden**-0.5)
    dtypes = (dtype, *(parameters or dtype for _ in range(3)))
    return tuple(  # type: ignore[return-value]
        (scale * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
        for shape, scale, dtype in zip(shapes, scales, dtypes, strict=True)
    )


def run(backend: str, tensors: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Result on a backend, and the gradients of those inputs that need one."""
    with dispatch.backend(backend):
        out = mlp(*tensors)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        return out, torch.autograd.grad(out, wanted, upstream.to(out.dtype).expand_as(out))


def as_double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]


def compare(tensors: Inputs, upstream: Tensor) -> None:
    """Kernel against the truth in fp64, by the error of the eager form."""
    ours, our_grads = run("triton", tensors, upstream)
    low, low_grads = run("eager", tensors, upstream)
    truth, true_grads = run("eager", as_double(tensors), upstream)
    assert_as_accurate([ours], [low], [truth], OUTPUT_FACTOR)
    assert_as_accurate(our_grads[:1], low_grads[:1], true_grads[:1], GRADIENT_FACTOR)
    assert [grad.dtype for grad in our_grads] == [tensor.dtype for tensor in tensors]
    assert_rms_as_accurate(our_grads[1:], low_grads[1:], true_grads[1:])


# The last two have tiles for tensor cores, and more tiles than programs in the interpreter.
SHAPES = [
    (1, 16, 16, 16),
    (3, 24, 48, 16),
    (64, 40, 72, 24),
    (70, 24, 72, 40),
    (70, 65, 131, 7),
    (130, 64, 128, 32),
    (300, 64, 256, 16),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype"), every_second([[*shape] for shape in SHAPES], DTYPES))
def test_kernel_is_as_accurate_as_eager(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tensors = inputs(*shape, dtype)
    compare(tensors, torch.randn(shape[0], shape[3], device=DEVICE).to(dtype))


@pytest.mark.usefixtures("poisoned")
def test_fp32_parameters_get_fp32_gradients() -> None:
    tensors = inputs(70, 24, 72, 40, torch.float16, parameters=torch.float32)
    compare(tensors, torch.randn(70, 40, device=DEVICE).half())


def test_every_tile_is_taken_once_in_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight1, bias1, _ = (tensor.detach() for tensor in inputs(700, 16, 200, 16, torch.float32))
    truth = x @ weight1.T + bias1  # 11 row tiles, more than one group; 4 column tiles
    for programs in (1, 3, 64):
        monkeypatch.setattr(linear_gelu.runtime, "multiprocessors", lambda device, count=programs: count)
        hidden, activated = linear_gelu.forward(x, weight1, bias1, keep_hidden=True)
        torch.testing.assert_close(hidden, truth, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(activated, torch.nn.functional.gelu(truth), rtol=1e-5, atol=1e-5)


def test_non_contiguous_inputs_and_gradients() -> None:
    x = torch.randn(5, 3, 48, device=DEVICE)[:, :, ::2].requires_grad_()
    weight1 = torch.randn(24, 40, device=DEVICE).T.requires_grad_()
    bias1 = torch.randn(80, device=DEVICE)[::2].requires_grad_()
    weight2 = torch.randn(40, 32, device=DEVICE)[:, ::2].T.requires_grad_()
    compare((x, weight1, bias1, weight2), torch.randn(16, 3, 5, device=DEVICE).permute(2, 1, 0))


def test_expanded_gradients() -> None:
    tensors = inputs(7, 24, 48, 16, torch.float32)
    compare(tensors, torch.ones((), device=DEVICE))
    compare(tensors, torch.randn(16, device=DEVICE))


@pytest.mark.usefixtures("kernels")
def test_leading_dimensions_are_kept_and_there_may_be_no_rows() -> None:
    _, *parameters = inputs(1, 24, 48, 16, torch.float32)
    x = torch.randn(2, 3, 24, device=DEVICE)
    assert torch.equal(mlp(x, *parameters), mlp(x.flatten(0, 1), *parameters).view(2, 3, 16))
    assert mlp(x[0, 0], *parameters).shape == (16,)
    empty = torch.empty(0, 3, 24, device=DEVICE, requires_grad=True)
    out = mlp(empty, *parameters)
    assert out.shape == (0, 3, 16)
    out.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3, 24)
    for parameter in parameters:
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_two_runs_are_bit_equal() -> None:
    tensors = inputs(300, 64, 256, 16, torch.float16)
    upstream = torch.randn(300, 16, device=DEVICE)
    (first, first_grads), (second, second_grads) = (run("triton", tensors, upstream) for _ in range(2))
    assert torch.equal(first, second)
    for one, other in zip(first_grads, second_grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("kernels")
def test_result_is_the_same_whether_or_not_a_backward_pass_will_follow() -> None:
    tensors = inputs(70, 24, 72, 40, torch.float16)
    with torch.no_grad():
        assert torch.equal(mlp(*tensors), mlp(*(tensor.detach() for tensor in tensors)))
    assert torch.equal(mlp(*tensors).detach(), mlp(*(tensor.detach() for tensor in tensors)))


@pytest.mark.usefixtures("kernels")
def test_autocast_does_not_change_the_products_inside() -> None:
    tensors = inputs(20, 24, 48, 16, torch.float32)
    plain = mlp(*tensors)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = mlp(*tensors)
        grads = torch.autograd.grad(out.sum(), tensors)
    assert torch.equal(out, plain)
    for one, other in zip(grads, torch.autograd.grad(plain.sum(), tensors), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("keep_hidden", [True, False])
def test_opcheck_of_the_op(keep_hidden: bool) -> None:
    tensors = inputs(20, 24, 48, 16, torch.float32)
    if not keep_hidden:
        tensors = tuple(tensor.detach() for tensor in tensors)  # type: ignore[assignment]
    torch.library.opcheck(torch.ops.lmim_fast.mlp.default, (*tensors, keep_hidden))


@pytest.mark.usefixtures("kernels")
def test_compiles_as_one_graph() -> None:
    tensors = inputs(20, 24, 48, 16, torch.float32)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    ours, truth = compiled(*tensors), mlp(*tensors)
    assert torch.equal(ours, truth)
    for mine, exact in zip(
        torch.autograd.grad(ours.sum(), tensors), torch.autograd.grad(truth.sum(), tensors), strict=True
    ):
        assert torch.equal(mine, exact)


def test_gradcheck_of_the_eager_form() -> None:
    assert torch.autograd.gradcheck(mlp, as_double(inputs(5, 3, 7, 4, torch.float32)))


def test_wrong_inputs_are_named() -> None:
    x, weight1, bias1, weight2 = (tensor.detach() for tensor in inputs(5, 24, 48, 16, torch.float32))
    named = r"x \(5, 24\), weight1 \(48, 24\), bias1 \(48,\), weight2 \(16, 48\)"
    wrong = [
        (x[:, :-1], weight1, bias1, weight2, named.replace("5, 24", "5, 23")),
        (x, weight1[0], bias1, weight2, named.replace("48, 24", "24,")),
        (x, weight1, bias1[:-1], weight2, named.replace(r"\(48,\)", r"\(47,\)")),
        (x, weight1, bias1, weight2.T, named.replace("16, 48", "48, 16")),
        (x, weight1, bias1, weight2[0], named.replace("16, 48", "48,")),
        (x.sum(), weight1, bias1, weight2, named.replace("5, 24", "")),
        (x.int(), weight1, bias1, weight2, "x must be of a float dtype, got torch.int32"),
        (x, weight1, bias1.long(), weight2, "bias1 must be of a float dtype, got torch.int64"),
        (x, weight1, bias1.to("meta"), weight2, "bias1 on meta"),
    ]
    for *tensors, message in wrong:
        with pytest.raises(ValueError, match=message):
            mlp(*tensors)


@pytest.mark.usefixtures("kernels")
def test_triton_asked_for_by_name_says_why_not() -> None:
    x, weight1, bias1, weight2 = (tensor.detach() for tensor in inputs(5, 24, 48, 16, torch.float32))
    with pytest.raises(RuntimeError, match=r"mlp has no kernel for empty weights, got \(0, 24\)"):
        mlp(x, weight1[:0], bias1[:0], weight2[:, :0])
    with pytest.raises(RuntimeError, match=r"mlp has no kernel for torch\.float64"):
        mlp(x, weight1.double(), bias1, weight2)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("rows", "width", "hidden"), [(131584, 384, 1536), (26624, 512, 2048), (19777, 768, 3072)]
)
def test_bf16_at_real_sizes_is_as_accurate_as_eager(rows: int, width: int, hidden: int) -> None:
    tensors = inputs(rows, width, hidden, width, torch.bfloat16, parameters=torch.float32)
    upstream = torch.randn(rows, width, device=DEVICE).bfloat16()
    compare(tensors, upstream)
    (first, first_grads), (second, second_grads) = (run("triton", tensors, upstream) for _ in range(2))
    assert torch.equal(first, second)
    for one, other in zip(first_grads, second_grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.usefixtures("kernels")
def test_cuda_graph_replays_the_same_values() -> None:
    tensors = inputs(1028, 384, 1536, 384, torch.bfloat16)
    upstream = torch.randn(1028, 384, device=DEVICE).bfloat16()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warms up, as capturing asks for
        run("triton", tensors, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = run("triton", tensors, upstream)
    with torch.no_grad():
        tensors[0].copy_(torch.randn_like(tensors[0]))
    graph.replay()
    truth, true_grads = run("triton", tensors, upstream)
    assert torch.equal(out, truth)
    for one, other in zip(grads, true_grads, strict=True):
        assert torch.equal(one, other)
