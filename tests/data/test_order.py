"""The order of samples: compared as sequences, for any split over steps, ranks and passes."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_fast.data import order as order_module
from lmim_fast.data.order import SampleOrder
from lmim_fast.errors import UsageError
from lmim_fast.ops import philox

counts = st.integers(1, 60)
seeds = st.integers(0, 2**64 - 1)


def stream(num_samples, seed, length):
    """The first (epoch, index) pairs, from the definition: each epoch is sorted by a 64-bit number."""
    pairs = []
    for epoch in range(-(-length // num_samples)):
        words = philox.uint32(seed, epoch, torch.arange(num_samples), 2, philox.Stream.ORDER).tolist()
        pairs += [(epoch, index) for index in sorted(range(num_samples), key=lambda index: words[index])]
    return pairs[:length]


def pairs_of(epochs, indices):
    assert epochs.dtype == indices.dtype == np.int64
    return list(zip(epochs.tolist(), indices.tolist(), strict=True))


@settings(max_examples=60)
@given(
    num_samples=counts,
    size=st.integers(1, 6),
    seed=seeds,
    before=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    after=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stop=st.integers(0, 6),
    steps=st.integers(1, 8),
)
def test_r03_a_run_stopped_anywhere_and_resumed_at_another_world_size_sees_the_one_sequence(
    num_samples, size, seed, before, after, stop, steps
):
    batch_size = size * int(np.lcm(np.prod(before), np.prod(after)))
    seen = []
    order = SampleOrder(num_samples, batch_size, seed)
    for step in range(steps):
        if step == stop:
            order = SampleOrder(num_samples, batch_size, seed)
        world_size, accumulation = before if step < stop else after
        for micro in range(accumulation):
            for rank in range(world_size):
                epochs, indices = order.share(step, rank, world_size, micro, accumulation)
                assert len(indices) == batch_size // (world_size * accumulation)
                seen += pairs_of(epochs, indices)
    assert seen == stream(num_samples, seed, steps * batch_size)


@settings(max_examples=50)
@given(num_samples=counts, batch_size=st.integers(1, 130), seed=seeds, steps=st.integers(1, 6))
def test_r03_each_epoch_holds_each_sample_once_and_batches_run_over_its_edge(
    num_samples, batch_size, seed, steps
):
    order = SampleOrder(num_samples, batch_size, seed)
    seen = [pair for step in range(steps) for pair in pairs_of(*order.batch(step))]
    for epoch in range(len(seen) // num_samples):
        part = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert {number for number, _ in part} == {epoch}
        assert sorted(index for _, index in part) == list(range(num_samples))
    tail = seen[len(seen) // num_samples * num_samples :]
    assert len(set(tail)) == len(tail) < num_samples


@settings(max_examples=30)
@given(
    num_samples=st.integers(5, 60),
    batch_size=st.integers(1, 50),
    seed=seeds,
    steps=st.lists(st.integers(0, 20), max_size=8),
)
def test_steps_may_be_asked_for_in_any_order(num_samples, batch_size, seed, steps):
    order = SampleOrder(num_samples, batch_size, seed)
    pairs = stream(num_samples, seed, 21 * batch_size)
    for step in steps:
        assert pairs_of(*order.batch(step)) == pairs[step * batch_size : (step + 1) * batch_size]


def test_the_order_of_a_seed_never_changes_between_versions():
    epochs, indices = SampleOrder(8, 16, seed=2024).batch(0)
    assert epochs.tolist() == [0] * 8 + [1] * 8
    assert indices.tolist() == [4, 5, 3, 0, 7, 6, 1, 2, 5, 3, 1, 7, 6, 0, 4, 2]


def test_epochs_differ_and_seeds_differ():
    first = SampleOrder(100, 100, 1)
    orders = [first.batch(0)[1], first.batch(1)[1], SampleOrder(100, 100, 2).batch(0)[1]]
    orders.append(SampleOrder(100, 100, 1 + 2**32).batch(0)[1])  # the seed's upper half counts
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_every_sample_comes_first_equally_often():
    order = SampleOrder(10, 10, seed=3)
    first = np.bincount([order.batch(epoch)[1][0] for epoch in range(1000)], minlength=10)
    chi_square = ((first - 100) ** 2 / 100).sum()
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_the_draw_in_chunks_is_the_draw_at_once(monkeypatch):
    monkeypatch.setattr(order_module, "_CHUNK", 7)
    in_chunks = SampleOrder(100, 100, 5).batch(0)[1]
    monkeypatch.undo()
    assert in_chunks.tolist() == SampleOrder(100, 100, 5).batch(0)[1].tolist()


def test_at_most_two_permutations_are_kept_and_none_is_pickled():
    order = SampleOrder(10_000, 4_000, 0)
    for step in [*range(12), 3, 11]:
        order.batch(step)
        assert 1 <= len(order._permutations) <= 2
    data = pickle.dumps(order)
    assert len(data) < 1000
    assert pairs_of(*pickle.loads(data).batch(2)) == pairs_of(*order.batch(2))


def test_consecutive_batches_compute_each_permutation_once(monkeypatch):
    order = SampleOrder(100, 30, 0)
    computed = []
    keys = order._sort_keys
    monkeypatch.setattr(order, "_sort_keys", lambda epoch: computed.append(epoch) or keys(epoch))
    for step in range(20):
        for rank in range(2):
            order.share(step, rank, 2, 0, 1)
    assert computed == list(range(6))


def test_a_batch_that_does_not_divide_is_a_usage_error_with_the_numbers():
    order = SampleOrder(10, 12, 0)
    with pytest.raises(UsageError, match=r"batch_size 12 must be a multiple of .* = 4 x 2 = 8"):
        order.share(0, 0, 4, 0, 2)


def test_the_size_of_a_share_takes_no_permutation(monkeypatch):
    order = SampleOrder(10, 12, 0)
    monkeypatch.setattr(order, "_sort_keys", None)
    assert order.share_size(2, 3) == 2
    with pytest.raises(UsageError, match=r"batch_size 12 must be a multiple of .* = 4 x 2 = 8"):
        order.share_size(4, 2)


@pytest.mark.parametrize(("rank", "micro"), [(2, 0), (-1, 0), (0, 3), (0, -1)])
def test_a_rank_or_pass_out_of_range_is_an_error(rank, micro):
    with pytest.raises(ValueError, match=f"got rank {rank}, micro {micro}"):
        SampleOrder(10, 12, 0).share(0, rank, 2, micro, 3)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(0, 1), (2**32, 1), (1, 0)])
def test_sizes_out_of_range_are_errors(num_samples, batch_size):
    with pytest.raises(ValueError, match=r"num_samples|batch_size"):
        SampleOrder(num_samples, batch_size, 0)


@settings(max_examples=100)
@given(st.data(), st.integers(2, 2**32 - 1), seeds, st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_a_substitute_is_another_sample_and_the_same_one_every_time(data, num_samples, seed, epoch, attempt):
    index = data.draw(st.integers(0, num_samples - 1))
    candidate = SampleOrder(num_samples, 4, seed).substitute(epoch, index, attempt)
    assert 0 <= candidate < num_samples
    assert candidate != index
    assert candidate == SampleOrder(num_samples, 8, seed).substitute(epoch, index, attempt)


def test_substitutes_depend_on_epoch_index_attempt_and_seed():
    def draw(seed, epoch, index, attempt):
        return SampleOrder(10**9, 1, seed).substitute(epoch, index, attempt)

    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 2)]
    assert len({draw(*place) for place in places}) == len(places)


def test_attempts_reach_every_other_sample_equally_often():
    order = SampleOrder(5, 1, 9)
    draws = np.bincount([order.substitute(0, 2, attempt) for attempt in range(400)], minlength=5)
    assert draws[2] == 0
    assert ((draws[[0, 1, 3, 4]] - 100) ** 2 / 100).sum() < 16.3  # 3 degrees of freedom, p = 0.001


def test_the_only_sample_is_its_own_substitute():
    assert SampleOrder(1, 1, 0).substitute(3, 0, 2) == 0
