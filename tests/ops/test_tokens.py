"""Decoder tokens and rows of a table: the eager forms, and the kernels against them."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
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
from lmim_fast.ops.masking import select_patches
from lmim_fast.ops.tokens import append_table_rows, decoder_tokens, gather_table, mask_table

Sizes = tuple[int, int, int, int]  # images, patches, visible ones, width


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def split(images: int, patches: int, visible: int) -> tuple[Tensor, Tensor]:
    return select_patches(torch.rand(images, patches, device=DEVICE), visible)


def token_inputs(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """visible, bias, mask_token, position, both ids."""
    images, patches, visible, width = sizes
    values = draw(images, 1 + visible, width, dtype=dtype), draw(width), draw(1, 1, width)
    return *values, draw(1, 1 + patches, width), *split(images, patches, visible)


def differentiate(
    backend: str, op: Callable[..., Tensor], inputs: Sequence[Tensor], count: int, upstream: Tensor
) -> list[Tensor]:
    """The result, and the gradients of the first `count` inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:count]]
    with dispatch.backend(backend):
        output = op(*leaves, *inputs[count:])
        return [output, *torch.autograd.grad(output, leaves, upstream)]


def exact(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def assert_tokens_are_accurate(sizes: Sizes, dtype: torch.dtype, result: torch.dtype) -> None:
    inputs = token_inputs(sizes, dtype)
    upstream = draw(sizes[0], 1 + sizes[1], sizes[3], dtype=result)
    op = partial(decoder_tokens, dtype=result)
    truth = differentiate("eager", decoder_tokens, exact(inputs), 3, upstream.double())
    low = differentiate("eager", op, inputs, 3, upstream)
    ours = differentiate("triton", op, inputs, 3, upstream)
    assert_as_accurate(ours[:1], low[:1], truth[:1], OUTPUT_FACTOR)
    assert_as_accurate(ours[1:2], low[1:2], truth[1:2], GRADIENT_FACTOR)
    assert_rms_as_accurate(ours[2:], low[2:], truth[2:])


def assert_rows_are_accurate(shown: int, sizes: Sizes, dtype: torch.dtype) -> None:
    images, patches, visible, width = sizes
    ids = split(images, patches, visible)[1]
    inputs = draw(images, shown, width, dtype=dtype), draw(patches, width, dtype=dtype), ids
    upstream = draw(images, shown + ids.shape[1], width, dtype=dtype)
    truth = differentiate("eager", append_table_rows, exact(inputs), 2, upstream.double())
    low = differentiate("eager", append_table_rows, inputs, 2, upstream)
    ours = differentiate("triton", append_table_rows, inputs, 2, upstream)
    assert torch.equal(ours[0], low[0])
    assert torch.equal(ours[1], upstream[:, :shown])
    assert ours[1].is_contiguous()
    assert_as_accurate(ours[2:], low[2:], truth[2:], GRADIENT_FACTOR)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_decoder_tokens_hold_cls_visible_and_masked_rows_with_their_positions(backend: str) -> None:
    visible, bias, mask_token, position, ids_visible, ids_masked = token_inputs((2, 16, 5, 8), torch.float32)
    with dispatch.backend(backend):
        tokens = decoder_tokens(visible, bias, mask_token, position, ids_visible, ids_masked)
    torch.testing.assert_close(tokens[:, 0], visible[:, 0] + bias + position[0, 0])
    for b in range(2):
        torch.testing.assert_close(tokens[b, 1:6], visible[b, 1:] + bias + position[0, 1 + ids_visible[b]])
        torch.testing.assert_close(tokens[b, 6:], mask_token[0] + position[0, 1 + ids_masked[b]])
    table = mask_table(mask_token, position)
    assert torch.equal(gather_table(table, ids_masked), tokens[:, 6:])


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_rows_of_a_table_follow_the_shown_ones_and_their_gradient_is_summed(backend: str) -> None:
    ids = torch.tensor([[2, 0], [2, 3], [1, 2]], device=DEVICE)  # in any order
    shown, table = draw(3, 2, 8).requires_grad_(), draw(4, 8).requires_grad_()
    upstream = draw(3, 4, 8)
    with dispatch.backend(backend):
        rows = append_table_rows(shown, table, ids)
        rows.backward(upstream)
        alone = append_table_rows(None, table, ids)
    assert torch.equal(rows, torch.cat([shown, table[ids]], dim=1))
    assert torch.equal(alone, table[ids])
    assert table.grad is not None
    late = upstream[:, 2:]
    expected = [late[0, 1], late[2, 0], late[0, 0] + late[1, 0] + late[2, 1], late[1, 1]]
    torch.testing.assert_close(table.grad, torch.stack(expected))
    assert shown.grad is not None
    assert torch.equal(shown.grad, upstream[:, :2])


def test_gradients_of_the_eager_forms_are_right() -> None:
    ids_visible, ids_masked = select_patches(torch.rand(2, 6), 2)

    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    tokens = double(2, 3, 4), double(4), double(1, 1, 4), double(1, 7, 4)
    assert torch.autograd.gradcheck(decoder_tokens, (*tokens, ids_visible, ids_masked))
    assert torch.autograd.gradcheck(append_table_rows, (double(2, 3, 4), double(6, 4), ids_masked))


SIZES = [(3, 16, 5, 20), (1, 5, 4, 7), (9, 6, 1, 16), (2, 4, 1, 600)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("sizes", "dtype"), every_second([[*sizes] for sizes in SIZES], DTYPES))
def test_token_kernels_are_as_accurate_as_the_eager_form(sizes: Sizes, dtype: torch.dtype) -> None:
    assert_tokens_are_accurate(sizes, dtype, dtype)


@pytest.mark.usefixtures("poisoned")
def test_tokens_come_in_the_dtype_asked_for() -> None:
    assert_tokens_are_accurate((3, 6, 2, 20), torch.float16, torch.float32)
    inputs = token_inputs((2, 6, 2, 20), torch.float16)
    for backend in ("eager", "triton"):
        with dispatch.backend(backend):
            assert decoder_tokens(*inputs).dtype == torch.float32, "that of position"
            assert decoder_tokens(*inputs, dtype=torch.float16).dtype == torch.float16


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shown", "sizes", "dtype"),
    every_second([(6, (3, 16, 5, 20)), (1, (1, 5, 4, 7)), (2, (9, 6, 1, 16)), (3, (2, 4, 1, 600))], DTYPES),
)
def test_table_row_kernels_are_as_accurate_as_the_eager_form(
    shown: int, sizes: Sizes, dtype: torch.dtype
) -> None:
    assert_rows_are_accurate(shown, sizes, dtype)


@pytest.mark.usefixtures("poisoned")
def test_more_ids_than_are_searched_at_once_are_found() -> None:
    ids = torch.randperm(300)[None, :290].to(DEVICE)
    inputs, upstream = (draw(1, 0, 2), draw(300, 2), ids), draw(1, 290, 2)
    ours, theirs = (
        differentiate(name, append_table_rows, inputs, 2, upstream) for name in ("triton", "eager")
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("poisoned")
def test_no_images_give_no_rows_and_zero_gradients_of_what_they_share() -> None:
    for backend in ("eager", "triton"):
        inputs = token_inputs((0, 6, 2, 8), torch.float32)
        _, grad_visible, *shared = differentiate(backend, decoder_tokens, inputs, 3, draw(0, 7, 8))
        assert grad_visible.shape == (0, 3, 8)
        rows = draw(0, 3, 8), draw(6, 8), inputs[5]
        shared += differentiate(backend, append_table_rows, rows, 2, draw(0, 7, 8))[2:]
        assert all((gradient == 0).all() for gradient in shared)


def test_strides_of_inputs_and_gradients_do_not_matter() -> None:
    images, shown, width = 3, 3, 20
    tokens = token_inputs((images, 6, 2, width), torch.float32)
    rows = draw(images, shown, width), draw(6, width), tokens[5]
    wide = draw(images, shown + 1, 3 * width)
    views = wide[:, 1:, 5 : 5 + width], draw(images, width, shown).transpose(1, 2)
    upstreams: list[Tensor] = [draw(1, 1, 1), draw(1, 7, width), draw(images, 7, 1), draw(images, width, 7)]
    upstreams[3] = upstreams[3].transpose(1, 2)
    upstreams.append(draw(images, 9, 2 * width)[:, 1:8, :width])
    for op, inputs, count in ((decoder_tokens, tokens, 3), (append_table_rows, rows, 2)):
        for view, upstream in zip(itertools.cycle(views), upstreams, strict=False):
            upstream = upstream.expand(images, 7, width)
            ours = differentiate("triton", op, [view, *inputs[1:]], count, upstream)
            plain = [view.contiguous(), *inputs[1:]]
            theirs = differentiate("triton", op, plain, count, upstream.contiguous())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    strided = draw(2 * 6, 2 * width)[::2, ::2]
    with dispatch.backend("triton"):
        assert torch.equal(append_table_rows(None, strided, rows[2]), gather_table(strided, rows[2]))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_the_gradient_of_one_input_is_that_of_all(wanted: tuple[bool, bool]) -> None:
    tokens = token_inputs((3, 6, 2, 20), torch.float32)
    rows = draw(3, 3, 20), draw(6, 20), tokens[5]
    upstream = draw(3, 7, 20)
    every = differentiate("triton", decoder_tokens, tokens, 3, upstream)[1:]
    leaves = [
        tensor.clone().requires_grad_(on) for tensor, on in zip(tokens, (*wanted, wanted[1]), strict=False)
    ]
    with dispatch.backend("triton"):
        decoder_tokens(*leaves, *tokens[3:]).backward(upstream)
    for leaf, gradient in zip(leaves, every, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, gradient)
    every = differentiate("triton", append_table_rows, rows, 2, upstream)[1:]
    leaves = [tensor.clone().requires_grad_(on) for tensor, on in zip(rows, wanted, strict=False)]
    with dispatch.backend("triton"):
        append_table_rows(*leaves, rows[2]).backward(upstream)
    for leaf, gradient in zip(leaves, every, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, gradient)


def test_without_a_gradient_of_the_mask_token_no_masked_row_is_read() -> None:
    inputs, upstream = list(token_inputs((3, 6, 2, 20), torch.float32)), draw(3, 7, 20)
    upstream[:, 3:] = float("nan")
    inputs[1].requires_grad_()
    with dispatch.backend("triton"):
        decoder_tokens(*inputs).backward(upstream)
    expected = upstream[:, :3].sum((0, 1))
    torch.testing.assert_close(inputs[1].grad, expected)
    _, sums = torch.ops.lmim_fast.decoder_tokens_backward(upstream, 3, None, False)
    torch.testing.assert_close(sums, torch.stack([expected, torch.zeros_like(expected)]))


def test_two_runs_give_the_same_bits() -> None:
    tokens = token_inputs((9, 6, 2, 20), torch.float16)
    rows = draw(9, 3, 20, dtype=torch.float16), draw(6, 20, dtype=torch.float16), tokens[5]
    for op, inputs, count in ((decoder_tokens, tokens, 3), (append_table_rows, rows, 2)):
        upstream = draw(9, 7, 20, dtype=op(*inputs).dtype)
        first, second = (differentiate("triton", op, inputs, count, upstream) for _ in range(2))
        assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


@pytest.mark.usefixtures("kernels")
def test_a_patch_that_is_not_in_the_table_shows_as_nan() -> None:
    ids = torch.tensor([[0, 4], [-1, 1]], device=DEVICE)
    rows = append_table_rows(None, draw(4, 8), ids)
    assert rows.isnan().all(dim=2).tolist() == [[False, True], [True, False]]
    shown = torch.tensor([[1, 6], [2, -1]], device=DEVICE)
    tokens = decoder_tokens(draw(2, 3, 8), draw(8), draw(1, 1, 8), draw(1, 5, 8), shown, ids)
    bad = [[False, False, True, False, True], [False, False, True, True, False]]
    assert tokens.isnan().all(dim=2).tolist() == bad


def test_a_position_that_learns_runs_the_eager_form() -> None:
    inputs = list(token_inputs((2, 6, 2, 8), torch.float32))
    inputs[3].requires_grad_()
    with dispatch.backend("triton"):
        with pytest.raises(RuntimeError, match="makes no gradient of position"):
            decoder_tokens(*inputs)
        with torch.no_grad():
            ours = decoder_tokens(*inputs)
    eager = decoder_tokens(*inputs)
    torch.testing.assert_close(ours, eager)
    (gradient,) = torch.autograd.grad(eager.sum(), inputs[3])
    torch.testing.assert_close(gradient, torch.full_like(gradient, 2.0), msg="each patch once an image")


def test_results_without_a_kernel_dtype_are_refused() -> None:
    inputs = token_inputs((2, 6, 2, 8), torch.float32)
    with (
        dispatch.backend("triton"),
        pytest.raises(RuntimeError, match=r"no kernel for results in torch\.float64"),
    ):
        decoder_tokens(*inputs, dtype=torch.float64)
    assert decoder_tokens(*inputs, dtype=torch.float64).dtype == torch.float64


def test_custom_ops_keep_the_rules_of_torch() -> None:
    ops = torch.ops.lmim_fast
    inputs = token_inputs((2, 6, 2, 20), torch.float16)
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
    torch.library.opcheck(ops.decoder_tokens.default, (*leaves, *inputs[3:], torch.float16))
    grad, ids = draw(2, 7, 20, dtype=torch.float16), inputs[5]
    for arguments in ((torch.float16, True), (None, False)):
        torch.library.opcheck(ops.decoder_tokens_backward.default, (grad, 3, *arguments))
    shown = draw(2, 3, 20).requires_grad_(), None
    for rows in shown:
        torch.library.opcheck(ops.append_table_rows.default, (rows, draw(6, 20).requires_grad_(), ids))
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.append_table_rows_backward.default, (grad, ids, 6, *wanted))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_both_compile_as_one_graph(backend: str) -> None:
    tokens = token_inputs((3, 6, 2, 20), torch.float32)
    rows = draw(3, 3, 20), draw(6, 20), tokens[5]
    upstream = draw(3, 7, 20)
    for op, inputs, count in ((decoder_tokens, tokens, 3), (append_table_rows, rows, 2)):
        compiled: Any = torch.compile(op, fullgraph=True, backend="aot_eager")
        ours = differentiate(backend, compiled, inputs, count, upstream)
        torch.testing.assert_close(ours, differentiate(backend, op, inputs, count, upstream))


def test_wrong_tokens_are_named() -> None:
    def run(**changed: Any) -> Tensor:
        ids = dict(ids_visible=torch.zeros(1, 2).long(), ids_masked=torch.zeros(1, 6).long())
        values = dict(visible=torch.zeros(1, 3, 8), bias=torch.zeros(8), mask_token=torch.zeros(1, 1, 8))
        return decoder_tokens(**(values | dict(position=torch.zeros(1, 9, 8)) | ids | changed))

    assert run().shape == (1, 9, 8)
    with pytest.raises(ValueError, match=r"ids_masked \(B, M\).* got .*\(1, 2\), \(1, 5\), \(1, 9, 8\)"):
        run(ids_masked=torch.zeros(1, 5).long())
    with pytest.raises(ValueError, match=r"got \[\(2, 3, 8\), \(1, 2\), \(1, 6\)"):
        run(visible=torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match=r"got \[\(3, 8\)"):
        run(visible=torch.zeros(3, 8))
    with pytest.raises(
        ValueError, match=r"bias \(8,\) and mask_token \(1, 1, 8\), got \(7,\) and \(1, 1, 8\)"
    ):
        run(bias=torch.zeros(7))
    with pytest.raises(ValueError, match=r"mask_token must be floating-point, got torch.int64"):
        run(mask_token=torch.zeros(1, 1, 8).long())
    with pytest.raises(ValueError, match=r"ids_visible must be int64, got torch.int32"):
        run(ids_visible=torch.zeros(1, 2).int())
    with pytest.raises(ValueError, match="one device, got visible on cpu, bias on meta"):
        run(bias=torch.zeros(8, device="meta"))
    with pytest.raises(ValueError, match=r"dtype must be floating-point, got torch.int64"):
        run(dtype=torch.int64)


def test_wrong_table_rows_are_named() -> None:
    shown, table, ids = torch.zeros(2, 3, 8), torch.zeros(4, 8), torch.zeros(2, 2).long()
    with pytest.raises(ValueError, match=r"got \(1, 4, 8\) and \(2, 2\)"):
        append_table_rows(shown, table[None], ids)
    with pytest.raises(ValueError, match=r"shown must be \(2, S, 8\) .* got \(2, 3, 7\)"):
        append_table_rows(shown[..., 1:], table, ids)
    with pytest.raises(ValueError, match=r"shown must be \(2, S, 8\) .* got \(1, 3, 8\)"):
        append_table_rows(shown[:1], table, ids)
    with pytest.raises(ValueError, match=r"one dtype, got torch.float16 and torch.float32"):
        append_table_rows(shown.half(), table, ids)
    with pytest.raises(ValueError, match="5 ids of an image cannot differ in a table of 4 rows"):
        append_table_rows(shown, table, torch.zeros(2, 5).long())
    with pytest.raises(ValueError, match=r"ids must be int64, got torch.float32"):
        append_table_rows(shown, table, ids.float())
    with pytest.raises(ValueError, match="one device, got shown on cpu, table on meta"):
        append_table_rows(shown, table.to("meta"), ids.to("meta"))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [512, 768])
def test_tokens_of_real_sizes_in_bf16(width: int) -> None:
    assert_tokens_are_accurate((64, 256, 51, width), torch.bfloat16, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [512, 1024, 1536])
def test_table_rows_of_real_sizes_in_bf16(width: int) -> None:
    assert_rows_are_accurate(52, (64, 256, 51, width), torch.bfloat16)


@pytest.mark.gpu
def test_cuda_graph_replay_is_equal() -> None:
    half = torch.bfloat16
    tokens, upstream = token_inputs((64, 256, 51, 512), half), draw(64, 257, 512)
    rows = draw(64, 52, 512, dtype=half), draw(256, 512, dtype=half), tokens[5]

    def run() -> list[Tensor]:
        return [
            *differentiate("triton", decoder_tokens, tokens, 3, upstream),
            *differentiate("triton", append_table_rows, rows, 2, upstream.to(half)),
        ]

    plain = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(mine, other) for mine, other in zip(captured, plain, strict=True))
