"""Philox4x32-10 against the known answers of Random123, and what the streams promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_fast.ops import philox
from lmim_fast.ops.philox import Stream

ONES = 0xFFFFFFFF
words32 = st.integers(0, ONES)


def philox_reference(counter, key):
    """Random123's philox4x32_R(10, ...), one counter at a time in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & ONES,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & ONES,
        )
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return [c0, c1, c2, c3]


# kat_vectors of Random123: counter, key, result
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_the_reference_of_this_file_gives_the_known_answers(counter, key, answer):
    assert philox_reference(counter, key) == answer


def test_counter_zero_and_key_zero_give_the_known_answer():
    assert philox.uint32(0, 0, torch.tensor([0]), 4, stream=0).tolist() == [KNOWN_ANSWERS[0][2]]


@settings(max_examples=200)
@given(seed=st.integers(0, 2**64 - 1), epoch=words32, index=words32, count=st.integers(1, 33), stream=words32)
def test_words_are_those_of_counter_block_index_epoch_stream_and_key_seed(seed, epoch, index, count, stream):
    expected = []
    for block in range(-(-count // 4)):
        expected += philox_reference([block, index, epoch, stream], [seed & ONES, seed >> 32])
    assert philox.uint32(seed, epoch, torch.tensor([index]), count, stream).tolist() == [expected[:count]]


def test_the_largest_counter_and_key_are_exact():
    expected = philox_reference([0, ONES, ONES, ONES], [ONES, ONES])
    assert philox.uint32(2**64 - 1, ONES, torch.tensor([ONES]), 4, ONES).tolist() == [expected]


@settings(max_examples=50)
@given(st.lists(words32, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_a_sample_draws_the_same_numbers_at_any_place_of_any_batch(indices, random):
    shuffled = random.sample(indices, len(indices))
    alone = {
        index: philox.uniform(7, 3, torch.tensor([index]), 10, Stream.MASK)[0].tolist() for index in indices
    }
    together = philox.uniform(7, 3, torch.tensor(shuffled), 10, Stream.MASK)
    assert [alone[index] for index in shuffled] == together.tolist()


def test_every_sample_may_have_its_own_epoch():
    index, epoch = torch.tensor([4, 4, 9, 0]), torch.tensor([0, 2, 2, 2**32 - 1])
    together = philox.uint32(5, epoch, index, 6, Stream.GUIDANCE)
    for row, (one_epoch, one_index) in enumerate(zip(epoch.tolist(), index.tolist(), strict=True)):
        alone = philox.uint32(5, one_epoch, torch.tensor([one_index]), 6, Stream.GUIDANCE)[0]
        assert together[row].tolist() == alone.tolist()


def test_streams_epochs_seeds_and_samples_share_no_numbers():
    draws = [
        philox.uint32(seed, epoch, torch.arange(50), 20, stream).flatten()
        for seed in (0, 1, 2**32)
        for epoch in (0, 1)
        for stream in Stream
    ]
    words = torch.cat(draws)
    # 24,000 words of 2^32 values: 0.07 accidental repetitions expected; a shared stream would give 1,000
    assert words.numel() - words.unique().numel() <= 3


def test_uniform_numbers_are_24_bit_fractions_below_one_with_flat_distribution():
    values = philox.uniform(11, 0, torch.arange(2000), 256, Stream.MASK)
    assert values.dtype == torch.float32
    assert values.shape == (2000, 256)
    scaled = values.double() * 2**24
    assert torch.equal(scaled, scaled.round())
    assert 0 <= values.min() < values.max() < 1
    assert np.isclose(values.double().var(), 1 / 12, rtol=0.01)
    for axis_sums in (values.double().mean(0), values.double().mean(1)):
        deviations = (axis_sums - 0.5) * (12 * values.numel() / axis_sums.numel()) ** 0.5
        assert deviations.abs().max() < 5.5  # of up to 2,000 normal deviates
    bins = torch.bincount((values.flatten() * 256).long(), minlength=256).double()
    expected = values.numel() / 256
    assert ((bins - expected) ** 2 / expected).sum() < 331  # 255 degrees of freedom, p = 0.001


def test_neighbouring_samples_and_epochs_are_uncorrelated():
    now = philox.uniform(0, 0, torch.arange(4001), 64, Stream.MASK).double() - 0.5
    later = philox.uniform(0, 1, torch.arange(4001), 64, Stream.MASK).double() - 0.5
    for one, other in ((now[:-1], now[1:]), (now[:, :-1], now[:, 1:]), (now, later)):
        correlation = (one * other).mean() * 12
        assert abs(correlation) * one.numel() ** 0.5 < 4


@pytest.mark.parametrize(
    ("epoch", "index", "message"),
    [
        (0, torch.tensor([1], dtype=torch.int32), "1-d int64 tensor, got torch.int32"),
        (0, torch.tensor([[1]]), r"1-d int64 tensor, got torch.int64 of shape \(1, 1\)"),
        (-1, torch.tensor([1]), r"epoch must be in \[0, 2\^32\), got -1"),
        (2**32, torch.tensor([1]), r"epoch must be in \[0, 2\^32\), got 4294967296"),
    ],
)
def test_wrong_arguments_are_errors(epoch, index, message):
    with pytest.raises(ValueError, match=message):
        philox.uint32(0, epoch, index, 4, Stream.MASK)


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    indices=st.lists(st.integers(0, ONES), max_size=9),
    count=st.integers(0, 13),
    own_epochs=st.booleans(),
)
def test_numbers_made_in_cpp_are_those_made_by_torch(seed, indices, count, own_epochs):
    index = torch.tensor(indices, dtype=torch.int64)
    epoch = ONES - index if own_epochs else 7
    assert philox._runs_native(seed, epoch, index)
    native = philox.uint32(seed, epoch, index, count, Stream.ORDER)
    eager = philox._eager(seed, epoch, index, count, Stream.ORDER)
    assert native.dtype == eager.dtype == torch.int64
    assert torch.equal(native, eager)
    uniform = philox.uniform(seed, epoch, index, count, Stream.ORDER)
    assert torch.equal(uniform, (eager >> 8).float() * 2.0**-24)


def test_strided_indices_and_epochs_are_read_in_their_order():
    index, epoch = torch.arange(20)[::3], torch.arange(14).view(7, 2)[:, 1]
    assert torch.equal(philox.uint32(1, epoch, index, 5, 0), philox._eager(1, epoch, index, 5, 0))


def test_a_traced_call_is_made_of_torch_operations():
    index = torch.arange(6)
    traced = torch.compile(lambda i: philox.uniform(3, 1, i, 8, Stream.MASK), fullgraph=True, backend="eager")
    assert torch.equal(traced(index), philox.uniform(3, 1, index, 8, Stream.MASK))
    with torch.device("meta"):
        assert philox.uint32(3, 1, index.to("meta"), 8, Stream.MASK).shape == (6, 8)


def test_a_default_device_does_not_matter():
    index = torch.arange(3)
    expected = philox.uniform(7, 1, index, 8, Stream.MASK)
    with torch.device("meta"):
        assert philox.uniform(7, 1, index, 8, Stream.MASK).equal(expected)
