"""Self-attention of two segments in one launch, bit by bit against a launch for each."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from accuracy import CUDA, DEVICE, DTYPES
from attention_cases import (
    Gradients,
    assert_nearly_equal,
    differentiate,
    draw,
    packed,
    seed,
    skip_where_too_long,
)
from torch import Tensor

from benchmarks.operation import launches
from lmim_fast.kernels import attention_pair, runtime

Segments = list[tuple[int, int]]

pytestmark = pytest.mark.usefixtures("poisoned")

ALONE, PAIRED = "attention.attention_forward", "attention_pair.attention_forward_pair"
ALONE_BACK = "attention_backward.attention_backward"
PAIRED_BACK = "attention_pair.attention_backward_pair"
# Dtype, bias, dropout.
FORMS = [
    (torch.float16, True, 0.0),
    (torch.float32, True, 0.25),
    (torch.float32, False, 0.0),
    (torch.float16, False, 0.25),
]
# Heads, head width, segments, launches of the backward pass: without normalisers, one or both with them.
# Every second problem in the same half of the forms: each of the three kinds meets all four.
PROBLEMS = [
    (2, 32, [(2, 5), (3, 20)], [PAIRED_BACK]),
    (1, 64, [(3, 20), (2, 5)], [PAIRED_BACK]),
    (1, 64, [(1, 64), (1, 52)], [PAIRED_BACK]),
    (1, 32, [(1, 52), (1, 70)], [ALONE_BACK] * 2),
    (2, 64, [(1, 70), (1, 52)], [ALONE_BACK] * 2),
    (1, 32, [(1, 65), (2, 129)], [ALONE_BACK] * 2),
    (1, 64, [(1, 129), (1, 70)], [ALONE_BACK] * 2),
]


@contextmanager
def most_programs(number: int) -> Iterator[None]:
    """Two segments share a launch up to so many programs a multiprocessor."""
    with mock.patch.object(attention_pair, "PAIRED_PROGRAMS", number):
        yield


def run(
    heads: int, dim: int, segments: Segments, dtype: torch.dtype, bias: bool = True, p: float = 0.0
) -> tuple[tuple[Tensor, Gradients], list[str]]:
    """Output and gradients of the same inputs at each call, and the kernels that were launched."""
    torch.manual_seed(5)
    form, inputs = packed(heads, dim, segments, dtype, bias)
    upstream = draw(sum(sequences * tokens for sequences, tokens in segments), heads * dim, dtype=dtype)
    with launches() as names:
        result = differentiate("triton", form, inputs, upstream, p=p, seed=seed() if p else None)
    return result, names


def assert_same(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> None:
    """Bit by bit; a compiler for a device may fuse other sums and products in another kernel."""
    assert_nearly_equal(found, expected, found[0].dtype)
    if not CUDA:
        assert torch.equal(found[0], expected[0])
        for mine, other in zip(found[1], expected[1], strict=True):
            assert mine is None or torch.equal(mine, other)


@pytest.mark.parametrize(
    ("problem", "form"),
    [
        pytest.param(
            problem, form, marks=[pytest.mark.slow] if form is not FORMS[number % 4] and not CUDA else []
        )
        for number, problem in enumerate(PROBLEMS)
        for form in FORMS[number % 2 :: 2]
    ],
)
def test_one_launch_gives_the_bits_of_two(
    problem: tuple[int, int, Segments, list[str]], form: tuple[torch.dtype, bool, float]
) -> None:
    (heads, dim, segments, back), (dtype, bias, p) = problem, form
    if dtype not in DTYPES:
        pytest.skip(f"kernels take no {dtype} on this device")
    skip_where_too_long(max(tokens for _, tokens in segments))
    with most_programs(0):
        expected, alone = run(heads, dim, segments, dtype, bias, p)
    with most_programs(8):
        found, paired = run(heads, dim, segments, dtype, bias, p)
    assert alone == [ALONE] * 2 + [ALONE_BACK] * 2
    assert paired == [PAIRED, *back] or CUDA  # there by the device
    assert_same(found, expected)


def in_wider(x: Tensor) -> Tensor:
    """The same values in rows that are further apart, NaN around them."""
    wide = torch.full((x.shape[0], x.shape[1] + 24), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, 8:-16] = x
    return wide[:, 8:-16]


def test_rows_of_inputs_and_gradients_may_be_apart() -> None:
    form, (qkv, bias) = packed(2, 32, [(2, 20), (2, 33)], DTYPES[0])
    upstream = draw(qkv.shape[0], 64, dtype=DTYPES[0])
    expected = differentiate("triton", form, [qkv, bias], upstream)
    with launches() as names:
        found = differentiate("triton", form, [in_wider(qkv), bias], in_wider(upstream))
    assert names == [PAIRED, PAIRED_BACK]
    assert_same(found, expected)


def test_more_programs_than_small_grids_have_make_a_launch_for_each_segment() -> None:
    most = attention_pair.PAIRED_PROGRAMS * runtime.multiprocessors(DEVICE)
    for sequences, expected in ((most - 1, [PAIRED, PAIRED_BACK]), (most, [ALONE] * 2 + [ALONE_BACK] * 2)):
        assert run(1, 32, [(1, 3), (sequences, 2)], DTYPES[0])[1] == expected


def test_one_segment_three_and_causal_ones_have_their_own_launches() -> None:
    for segments in ([(2, 5)], [(1, 5), (1, 6), (1, 7)]):
        expected = [ALONE] * len(segments) + [ALONE_BACK] * len(segments)
        assert run(1, 32, segments, DTYPES[0])[1] == expected
    form, inputs = packed(1, 32, [(1, 5), (2, 6)], DTYPES[0])
    with launches() as names:
        differentiate("triton", form, inputs, causal=True)
    assert names == [ALONE] * 2 + [ALONE_BACK] * 2


@pytest.mark.parametrize(
    ("major", "dim", "tokens", "forward", "backward"),
    [
        (9, 64, (52, 257), True, False),
        (10, 64, (52, 257), True, False),
        (9, 64, (257, 52), True, False),
        (8, 64, (25, 52), True, False),
        (8, 32, (25, 52), True, True),
        (9, 64, (25, 52), True, True),
        (9, 32, (25, 52), True, True),
        (10, 32, (25, 52), True, True),
        (9, 64, (129, 257), True, False),
        (10, 32, (52, 257), False, False),  # programs of 257 tokens have no limit of registers there
        (9, 64, (257, 257), False, False),  # would spill
        (9, 64, (52, 52), False, False),
    ],
)
def test_segments_share_a_launch_where_one_kernel_can_be_compiled_for_both(
    major: int, dim: int, tokens: tuple[int, int], forward: bool, backward: bool
) -> None:
    segments = 64, tokens[0], 64, tokens[1]
    assert not attention_pair.pairs(segments, 6, 64, 26, (10, 0), 132, backward=True)  # dropout would spill
    for back, expected in ((False, forward), (True, backward)):
        given = segments, 6, dim, 0, (major, 0)
        assert attention_pair.pairs(*given, 132, backward=back) == expected
        assert not attention_pair.pairs(*given, 95, backward=back)  # 768 programs are too many
        assert not attention_pair.pairs((0, 52, *segments[2:]), *given[1:], 132, backward=back)


def test_the_operators_of_a_pair_keep_the_contract_of_pytorch() -> None:
    ops, drawn = torch.ops.lmim_fast, seed()
    _, (qkv, bias) = packed(2, 32, [(2, 3), (1, 5)], DTYPES[0])
    rest = 2, [2, 3, 1, 5], 0.25
    leaves = [tensor.clone().requires_grad_() for tensor in (qkv, bias)]
    with launches() as names:
        torch.library.opcheck(ops.self_attention.default, (*leaves, drawn, *rest))
        out, normaliser = ops.self_attention(qkv, bias, drawn, *rest)
        given = draw(*out.shape, dtype=out.dtype), qkv, bias, drawn, out, normaliser, *rest, True
        torch.library.opcheck(ops.self_attention_backward.default, given)
    assert set(names) == {PAIRED, PAIRED_BACK}
