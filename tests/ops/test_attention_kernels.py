"""The attention kernels against attention written out in fp64."""

import pytest
import torch
from accuracy import DEVICE, DTYPES, every_second
from attention_cases import (
    assert_kernel_is_accurate,
    assert_nearly_equal,
    crossed,
    differentiate,
    draw,
    mask_mismatch,
    packed,
    seed,
    skip_where_too_long,
)
from torch import Tensor

from benchmarks.operation import launches
from lmim_fast.ops import attention

Segments = list[tuple[int, int]]

pytestmark = pytest.mark.usefixtures("poisoned")

# Heads, head width, segments. One tile of keys up to 64; a key apart at 129 and 257; two chunks in the
# backward pass beyond 129 with heads of 32; a rest of few queries at 65, 205, 257; missing keys at 51, 100.
SELF = [
    (1, 32, [(64, 1)]),
    (2, 64, [(3, 1)]),
    (2, 32, [(3, 16)]),
    (3, 32, [(1, 51)]),
    (2, 64, [(2, 52)]),
    (2, 32, [(2, 64)]),
    (2, 32, [(1, 65)]),
    (2, 64, [(1, 100)]),
    (1, 32, [(1, 128)]),
    (2, 32, [(1, 129)]),
    (1, 64, [(1, 129)]),
    (1, 32, [(1, 255)]),
    (1, 64, [(1, 197)]),
    (1, 32, [(1, 256)]),
    (2, 32, [(1, 257)]),
    (1, 64, [(1, 257)]),
    (2, 32, [(3, 20), (1, 65), (2, 52), (1, 257)]),
]
# Heads, head width, (batch, queries, keys).
CROSS = [
    (1, 32, (1, 1, 1)),
    (2, 64, (3, 16, 52)),
    (1, 32, (1, 257, 64)),
    (2, 32, (2, 70, 51)),
    (2, 32, (2, 1, 257)),
    (2, 64, (1, 33, 129)),
    (1, 64, (2, 65, 100)),
    (2, 32, (1, 205, 257)),
    (1, 64, (2, 20, 257)),
]


@pytest.mark.parametrize(("heads", "dim", "segments", "dtype"), every_second(SELF, DTYPES))
def test_self_attention_is_as_accurate_as_eager(
    heads: int, dim: int, segments: Segments, dtype: torch.dtype
) -> None:
    skip_where_too_long(max(tokens for _, tokens in segments))
    assert_kernel_is_accurate(*packed(heads, dim, segments, dtype))


@pytest.mark.parametrize(("heads", "dim", "sizes", "dtype"), every_second(CROSS, DTYPES))
def test_cross_attention_is_as_accurate_as_eager(
    heads: int, dim: int, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    skip_where_too_long(sizes[2])
    assert_kernel_is_accurate(*crossed(heads, dim, sizes, dtype))


@pytest.mark.parametrize(("tokens", "dtype"), every_second([52, 257], DTYPES))
def test_attention_without_biases_is_as_accurate_as_eager(tokens: int, dtype: torch.dtype) -> None:
    skip_where_too_long(tokens)
    assert_kernel_is_accurate(*packed(2, 32, [(1, tokens)], dtype, bias=False))
    assert_kernel_is_accurate(*crossed(2, 32, (1, 20, tokens), dtype, bias=False))


SELF_DROPPED = [
    (2, 32, [(2, 16), (3, 20)], 0.5),
    (3, 32, [(1, 51)], 0.1),
    (2, 64, [(1, 64), (2, 52)], 0.1),
    (1, 64, [(1, 70)], 0.1),
    (1, 64, [(1, 129)], 0.3),
    (2, 32, [(1, 65), (1, 129)], 0.1),
    (1, 32, [(1, 255)], 0.1),
    (1, 32, [(2, 9), (1, 257)], 0.1),
]


@pytest.mark.parametrize(("heads", "dim", "segments", "p", "dtype"), every_second(SELF_DROPPED, DTYPES))
def test_self_attention_drops_what_the_seed_says(
    heads: int, dim: int, segments: Segments, p: float, dtype: torch.dtype
) -> None:
    skip_where_too_long(max(tokens for _, tokens in segments))
    assert_kernel_is_accurate(*packed(heads, dim, segments, dtype), p=p, seed=seed())


CROSS_DROPPED = [
    (2, 32, (3, 70, 52), True),
    (2, 64, (1, 33, 129), True),
    (1, 64, (1, 65, 100), True),
    (1, 32, (1, 205, 257), True),
    (2, 32, (2, 20, 257), False),
    (1, 64, (1, 25, 257), True),
]


@pytest.mark.parametrize(("heads", "dim", "sizes", "bias", "dtype"), every_second(CROSS_DROPPED, DTYPES))
def test_cross_attention_drops_what_the_seed_says(
    heads: int, dim: int, sizes: tuple[int, int, int], bias: bool, dtype: torch.dtype
) -> None:
    skip_where_too_long(sizes[2])
    assert_kernel_is_accurate(*crossed(heads, dim, sizes, dtype, bias), p=0.1, seed=seed())


@pytest.mark.parametrize("tokens", [40, 257])
def test_a_drawn_mask_follows_torchs_generator_and_is_that_of_the_backward_pass(tokens: int) -> None:
    skip_where_too_long(tokens)
    form, inputs = packed(1, 32, [(1, tokens)], DTYPES[0], bias=False)
    upstream = draw(tokens, 32, dtype=DTYPES[0])
    results = []
    for state in (1, 1, 2):
        torch.manual_seed(state)
        results.append(differentiate("triton", form, inputs, upstream, p=0.3))
    (output, (gradient, _)), repeated, other = results
    assert torch.equal(output, repeated[0])
    assert torch.equal(gradient, repeated[1][0])
    assert not torch.equal(output, other[0])
    qkv, tolerance = inputs[0], 10 * torch.finfo(DTYPES[0]).eps
    assert mask_mismatch(qkv, gradient, output, upstream) < tolerance
    assert mask_mismatch(qkv, other[1][0], output, upstream) > tolerance


def test_a_seed_without_dropout_changes_nothing() -> None:
    form, inputs = packed(2, 32, [(2, 20)], DTYPES[0])
    plain = differentiate("triton", form, inputs)
    seeded = differentiate("triton", form, inputs, p=0.0, seed=seed())
    assert_nearly_equal(seeded, plain, DTYPES[0])


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("tokens", [52, 255, 257])
def test_large_scores_stay_finite_and_right(tokens: int, dtype: torch.dtype) -> None:
    skip_where_too_long(tokens)
    form, (qkv, bias) = packed(2, 32, [(1, tokens)], dtype)
    assert_kernel_is_accurate(form, [qkv * 30, bias])


# The interpreter casts rows that it then does not store.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning:triton")
@pytest.mark.parametrize(("dim", "keys", "size"), [(64, 100, 1000), (64, 200, 1000), (32, 100, 1500)])
def test_missing_keys_do_not_overflow_where_all_scores_are_low(dim: int, keys: int, size: int) -> None:
    """Their score of 0 is far above those of the keys there are."""
    skip_where_too_long(keys)
    qkv = torch.ones(keys, 3, dim, dtype=torch.float16, device=DEVICE)
    qkv[:, :2] = 0
    qkv[:, 0, 0], qkv[:, 1, 0] = 8, -8
    form = packed(1, dim, [(1, keys)], torch.float16, bias=False)[0]
    upstream = torch.full((keys, dim), float(size), dtype=torch.float16, device=DEVICE)
    _, (gradient, _) = differentiate("triton", form, [qkv.flatten(1), None], upstream)
    assert gradient.isfinite().all()
    assert gradient[:, :dim].count_nonzero() == 0


def poison(x: Tensor, clean: Tensor) -> Tensor:
    """x where `clean`, elsewhere NaN and infinity in turns."""
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")], device=x.device, dtype=x.dtype)
    return torch.where(clean, x, bad.repeat(-(-x.numel() // 3))[: x.numel()].view(x.shape))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize(
    ("dim", "tokens", "p"),
    [
        (32, 16, 0.0),
        (32, 52, 0.1),
        (32, 65, 0.0),
        (64, 100, 0.0),
        (32, 129, 0.0),
        (32, 255, 0.1),
        (64, 257, 0.0),
    ],
)
def test_other_sequences_and_heads_do_not_reach_a_head(dim: int, tokens: int, p: float) -> None:
    skip_where_too_long(tokens)
    form, (qkv, _) = packed(2, dim, [(2, tokens)], DTYPES[0], bias=False)
    upstream = draw(2 * tokens, 2 * dim, dtype=DTYPES[0])
    # Clean are the first head of the first sequence and the second head of the second sequence.
    clean = torch.eye(2, dtype=torch.bool, device=DEVICE).repeat_interleave(tokens, 0)[:, None, :, None]

    def blocks(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2, dim))

    def dirty(x: Tensor) -> Tensor:
        return poison(blocks(x), clean).flatten(1)

    options = dict(p=p, seed=seed())
    expected = differentiate("triton", form, [qkv, None], upstream, **options)
    found = differentiate("triton", form, [dirty(qkv), None], dirty(upstream), **options)
    for whole, other in [(expected[0], found[0]), (expected[1][0], found[1][0])]:
        assert torch.equal(torch.where(clean, blocks(other), 0.0), torch.where(clean, blocks(whole), 0.0))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("sizes", [(3, 70, 52), (3, 20, 129), (3, 20, 257), (3, 17, 200)])
def test_other_sequences_do_not_reach_a_cross_attention(sizes: tuple[int, int, int]) -> None:
    skip_where_too_long(sizes[2])
    form, inputs = crossed(1, 32, sizes, DTYPES[0], bias=False)
    upstream = draw(*sizes[:2], 32, dtype=DTYPES[0])
    expected = differentiate("triton", form, inputs, upstream)
    clean = torch.tensor([False, True, False], device=DEVICE)[:, None, None]
    dirty = [None if tensor is None else poison(tensor, clean) for tensor in inputs]
    found = differentiate("triton", form, dirty, poison(upstream, clean))
    assert torch.equal(found[0][1], expected[0][1])
    for number in (0, 2):
        assert torch.equal(found[1][number][1], expected[1][number][1])


@pytest.mark.parametrize(("tokens", "p"), [(52, 0.1), (257, 0.1), (200, 0.0)])
def test_two_runs_are_bit_equal(tokens: int, p: float) -> None:
    skip_where_too_long(tokens)
    for form, inputs in (
        packed(1, 32, [(1, tokens)], DTYPES[-1]),
        crossed(1, 32, (1, 20, tokens), DTYPES[-1]),
    ):
        first, second = (differentiate("triton", form, inputs, p=p, seed=seed()) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(mine, other) for mine, other in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("tokens", [20, 129])
def test_no_sequences_give_an_empty_context_and_no_bias_gradient(tokens: int, backend: str) -> None:
    skip_where_too_long(tokens)
    for form, inputs in (
        packed(2, 32, [(0, tokens)], DTYPES[0]),
        packed(2, 32, [(0, tokens), (0, 5)], DTYPES[0]),
        crossed(2, 32, (0, 20, tokens), DTYPES[0]),
    ):
        output, gradients = differentiate(backend, form, inputs)
        assert output.shape == (*inputs[0].shape[:-1], 64)
        assert [x.shape for x in gradients] == [x.shape for x in inputs]
        assert all(x.count_nonzero() == 0 for x in gradients[1::2])


def test_a_segment_without_sequences_leaves_the_others_as_they_are() -> None:
    _, inputs = packed(2, 32, [(2, 20)], DTYPES[0])
    for segments in ([(0, 70), (2, 20)], [(2, 20), (0, 70)]):
        form = packed(2, 32, segments, DTYPES[0])[0]
        expected = differentiate("triton", packed(2, 32, [(2, 20)], DTYPES[0])[0], inputs)
        found = differentiate("triton", form, inputs)
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(mine, other) for mine, other in zip(found[1], expected[1], strict=True))


def test_the_kernels_are_what_backend_triton_runs() -> None:
    form, inputs = packed(1, 32, [(1, 4), (1, 5)], DTYPES[0])
    with launches() as names, attention.backend("triton"):
        form(*inputs)
    assert names == ["attention_pair.attention_forward_pair"]
