"""The attention kernels as PyTorch operators: layouts, partial gradients, fake forms, compilation."""

from collections.abc import Callable

import pytest
import torch
from accuracy import DTYPES
from attention_cases import (
    Form,
    Inputs,
    assert_nearly_equal,
    crossed,
    differentiate,
    draw,
    packed,
    seed,
    skip_where_too_long,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmim_fast.ops import attention
from lmim_fast.ops.attention import cross_attention, self_attention

pytestmark = pytest.mark.usefixtures("poisoned")


def in_wider(x: Tensor) -> Tensor:
    """The same values as columns of a wider matrix that is NaN around them."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 8), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 8 : 8 + x.shape[-1]] = x
    return wide[..., 8 : 8 + x.shape[-1]]


def with_strided_columns(x: Tensor) -> Tensor:
    """The same values with a last dimension that is not contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def with_every_other_row(x: Tensor) -> Tensor:
    """The same values with NaN rows between them."""
    return torch.stack([x, torch.full_like(x, float("nan"))], dim=-2).flatten(-3, -2)[..., ::2, :]


def small_problems(tokens: int, dtype: torch.dtype) -> list[tuple[Form, Inputs]]:
    return [packed(2, 32, [(2, tokens)], dtype), crossed(2, 32, (2, 20, tokens), dtype)]


@pytest.mark.parametrize("layout", [in_wider, with_strided_columns, with_every_other_row])
@pytest.mark.parametrize("tokens", [20, 65])
def test_layouts_of_inputs_and_gradients_change_nothing(
    tokens: int, layout: Callable[[Tensor], Tensor]
) -> None:
    skip_where_too_long(tokens)
    for form, inputs in small_problems(tokens, DTYPES[0]):
        upstream = torch.randn_like(form(*inputs))
        expected = differentiate("triton", form, inputs, upstream)
        moved = [layout(tensor) if tensor is not None and tensor.dim() > 1 else tensor for tensor in inputs]
        assert not any(tensor.is_contiguous() for tensor in moved[::2])
        assert all(torch.equal(tensor, other) for tensor, other in zip(moved, inputs, strict=True))
        assert_nearly_equal(differentiate("triton", form, moved, upstream), expected, DTYPES[0])
        assert_nearly_equal(differentiate("triton", form, inputs, layout(upstream)), expected, DTYPES[0])


def test_keys_and_values_may_be_a_chunk_of_all_layers() -> None:
    heads, (q, q_bias, kv, kv_bias) = 2, crossed(2, 32, (2, 20, 52), DTYPES[-1])[1]
    layers = torch.cat([torch.full_like(kv, float("nan")), kv], dim=-1)

    def form(q: Tensor, q_bias: Tensor, layers: Tensor, kv_bias: Tensor) -> Tensor:
        return cross_attention(q, q_bias, layers.chunk(2, dim=-1)[1], kv_bias, heads)

    plain = differentiate("triton", crossed(2, 32, (2, 20, 52), DTYPES[-1])[0], [q, q_bias, kv, kv_bias])
    output, gradients = differentiate("triton", form, [q, q_bias, layers, kv_bias])
    assert gradients[2].chunk(2, dim=-1)[0].count_nonzero() == 0
    gradients[2] = gradients[2].chunk(2, dim=-1)[1]
    assert_nearly_equal((output, gradients), plain, DTYPES[-1])


@pytest.mark.parametrize("tokens", [20, 65])
def test_gradients_of_a_sum_are_those_of_ones(tokens: int) -> None:
    skip_where_too_long(tokens)
    for form, inputs in small_problems(tokens, DTYPES[0]):
        expanded = differentiate("triton", form, inputs)
        ones = differentiate("triton", form, inputs, torch.ones_like(expanded[0]))
        assert_nearly_equal(expanded, ones, DTYPES[0])


@pytest.mark.parametrize("tokens", [20, 65])
def test_an_input_alone_gets_the_gradient_it_gets_among_all(tokens: int) -> None:
    skip_where_too_long(tokens)
    for form, inputs in small_problems(tokens, DTYPES[0]):
        upstream = torch.randn_like(form(*inputs))
        _, among_all = differentiate("triton", form, inputs, upstream)
        for number, expected in enumerate(among_all):
            leaves = [tensor.detach().requires_grad_(i == number) for i, tensor in enumerate(inputs)]
            with attention.backend("triton"):
                form(*leaves).backward(upstream)
            found = leaves[number].grad
            assert_nearly_equal((expected, [found]), (expected, [expected]), DTYPES[0])
            assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != number)


@pytest.mark.parametrize("tokens", [20, 65])
@pytest.mark.parametrize("which", [1, 3])
def test_cross_attention_takes_either_bias_alone(which: int, tokens: int) -> None:
    skip_where_too_long(tokens)
    form, inputs = crossed(2, 32, (2, 20, tokens), DTYPES[0])
    upstream = torch.randn_like(form(*inputs))
    inputs[which] = torch.zeros_like(inputs[which])
    with_zeros, gradients = differentiate("triton", form, inputs, upstream)
    inputs[which] = gradients[which] = None
    found = differentiate("triton", form, inputs, upstream)
    assert_nearly_equal(found, (with_zeros, gradients), DTYPES[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bias_gradients_come_in_the_biases_dtype(dtype: torch.dtype) -> None:
    for form, inputs in small_problems(20, DTYPES[-1]):
        typed = [tensor.to(dtype) if tensor.dim() == 1 else tensor for tensor in inputs]
        _, gradients = differentiate("triton", form, typed)
        assert [x.dtype for x in gradients] == [x.dtype for x in typed]


SAMPLES = [
    (20, True, 0.1),
    (65, False, 0.0),
    *(
        pytest.param(*sample, marks=pytest.mark.slow)
        for sample in ((20, True, 0.0), (20, False, 0.1), (65, True, 0.0), (65, True, 0.1))
    ),
]


@pytest.mark.parametrize(("tokens", "bias", "p"), SAMPLES)
def test_operators_keep_the_contract_of_pytorch(tokens: int, bias: bool, p: float) -> None:
    skip_where_too_long(tokens)
    ops, dtype = torch.ops.lmim_fast, DTYPES[0]
    drawn = seed() if p else None
    _, (qkv, qkv_bias) = packed(1, 32, [(1, 5), (1, tokens)], dtype, bias)
    for tensor in (qkv, qkv_bias):
        if tensor is not None:
            tensor.requires_grad_()
    rest = (1, [1, 5, 1, tokens], p)
    torch.library.opcheck(ops.self_attention.default, (qkv, qkv_bias, drawn, *rest))
    qkv, qkv_bias = qkv.detach(), None if qkv_bias is None else qkv_bias.detach()
    out, normaliser = ops.self_attention(qkv, qkv_bias, drawn, *rest)
    given = (draw(*out.shape, dtype=dtype), qkv, qkv_bias, drawn, out, normaliser, *rest, bias)
    torch.library.opcheck(ops.self_attention_backward.default, given)


@pytest.mark.parametrize(("tokens", "bias", "p"), SAMPLES)
def test_cross_operators_keep_the_contract_of_pytorch(tokens: int, bias: bool, p: float) -> None:
    skip_where_too_long(tokens)
    ops, dtype = torch.ops.lmim_fast, DTYPES[0]
    drawn = seed() if p else None
    _, inputs = crossed(1, 32, (1, 9, tokens), dtype, bias)
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in inputs]
    torch.library.opcheck(ops.cross_attention.default, (*leaves, drawn, 1, p))
    out, normaliser = ops.cross_attention(*inputs, drawn, 1, p)
    given = (draw(*out.shape, dtype=dtype), *inputs, drawn, out, normaliser, 1, p, bias)
    torch.library.opcheck(ops.cross_attention_backward.default, given)


@pytest.mark.parametrize(
    ("backend", "p"),
    [
        ("auto", 0.1),  # draws its own seed
        ("triton", 0.1),
        ("eager", 0.0),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("auto", 0.0), ("triton", 0.0), ("eager", 0.1))
        ),
    ],
)
def test_attention_compiles_in_one_graph(backend: str, p: float) -> None:
    torch.compiler.reset()
    qkv, bias = (tensor.requires_grad_() for tensor in packed(2, 32, [(2, 5), (1, 9)], DTYPES[0])[1])
    fixed = seed() if p and backend != "auto" else None

    def form(qkv: Tensor, bias: Tensor) -> Tensor:
        return self_attention(2 * qkv, bias, 2, [(2, 5), (1, 9)], p=p, seed=fixed) + 1

    with attention.backend(backend):
        compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
        output, expected = compiled(qkv, bias), form(qkv, bias)
    if p and fixed is None:
        assert output.shape == expected.shape
        assert output.isfinite().all()
        return
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(output, expected)
    for mine, other in zip(
        *(torch.autograd.grad(x, (qkv, bias), upstream) for x in (output, expected)), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_checkpointed_attention_draws_its_mask_again_alike() -> None:
    form, (qkv, bias) = packed(2, 32, [(2, 20)], DTYPES[0])
    upstream = torch.randn_like(form(qkv, bias))

    def on_kernels(*inputs: Tensor, **options: object) -> Tensor:
        with attention.backend("triton"):
            return form(*inputs, **options)

    def checkpointed(*inputs: Tensor, **options: object) -> Tensor:
        return checkpoint(on_kernels, *inputs, use_reentrant=False, **options)

    results = []
    for function in (form, checkpointed):
        torch.manual_seed(3)
        results.append(differentiate("triton", function, [qkv, bias], upstream, p=0.3))
    assert torch.equal(results[0][0], results[1][0])
    assert_nearly_equal(*results, DTYPES[0])
