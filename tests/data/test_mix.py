"""The order of mixed data: shares, streams of the groups, any split over steps, ranks and passes."""

import pickle
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_fast.data.mix import MixedOrder
from lmim_fast.data.order import SampleOrder
from lmim_fast.errors import UsageError

seeds = st.integers(0, 2**64 - 1)


def grouped(counts):
    """(first, count) of groups of these counts, one behind the other."""
    return [(sum(counts[:number]), count) for number, count in enumerate(counts)]


@st.composite
def mixtures(draw):
    counts = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    weights = draw(st.lists(st.integers(1, 3), min_size=len(counts), max_size=len(counts)))
    # Enough places for each group: a weight that gives none is an error with a test of its own.
    extra = max(0, 12 - sum(counts))
    return grouped([counts[0] + extra, *counts[1:]]), weights


def pairs_of(epochs, indices):
    assert epochs.dtype == indices.dtype == np.int64
    return list(zip(epochs.tolist(), indices.tolist(), strict=True))


def stream(order, length):
    return pairs_of(*order.places(0, length))


def group_of(groups, index):
    return next(n for n, (first, count) in enumerate(groups) if first <= index < first + count)


@settings(max_examples=40)
@given(
    mixture=mixtures(),
    size=st.integers(1, 6),
    seed=seeds,
    before=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    after=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stop=st.integers(0, 6),
    steps=st.integers(1, 8),
)
def test_r03_a_run_stopped_anywhere_and_resumed_at_another_world_size_sees_the_one_mixture(
    mixture, size, seed, before, after, stop, steps
):
    batch_size = size * int(np.lcm(np.prod(before), np.prod(after)))
    seen = []
    order = MixedOrder(*mixture, batch_size, seed)
    for step in range(steps):
        if step == stop:
            order = MixedOrder(*mixture, batch_size, seed)
        world_size, accumulation = before if step < stop else after
        for micro in range(accumulation):
            for rank in range(world_size):
                epochs, indices = order.share(step, rank, world_size, micro, accumulation)
                assert len(indices) == order.share_size(world_size, accumulation)
                seen += pairs_of(epochs, indices)
    assert seen == stream(MixedOrder(*mixture, 1, seed), steps * batch_size)


@settings(max_examples=40)
@given(mixture=mixtures(), batch_size=st.integers(1, 70), seed=seeds)
def test_every_group_has_its_share_of_every_epoch_and_is_walked_without_repetition(mixture, batch_size, seed):
    groups, weights = mixture
    order = MixedOrder(groups, weights, batch_size, seed)
    total = order.num_samples
    assert total == sum(count for _, count in groups)
    steps = -(-4 * total // batch_size)
    seen = [pair for step in range(steps) for pair in pairs_of(*order.batch(step))][: 4 * total]
    assert len(set(seen)) == len(seen)
    walks = defaultdict(list)
    for epoch in range(4):
        part = seen[epoch * total : (epoch + 1) * total]
        owners = Counter(group_of(groups, index) for _, index in part)
        for number, weight in enumerate(weights):
            assert owners[number] == order.shares[number]
            assert abs(owners[number] - Fraction(weight * total, sum(weights))) < 1
    for epoch, index in seen:
        walks[group_of(groups, index)].append((epoch, index))
    for number, walk in walks.items():
        first, count = groups[number]
        for start in range(0, len(walk), count):
            part = walk[start : start + count]
            assert {epoch for epoch, _ in part} == {start // count}
            assert len({index for _, index in part}) == len(part)
            assert all(first <= index < first + count for _, index in part)


@settings(max_examples=30)
@given(
    mixture=mixtures(),
    batch_size=st.integers(1, 50),
    seed=seeds,
    steps=st.lists(st.integers(0, 20), max_size=8),
)
def test_steps_may_be_asked_for_in_any_order(mixture, batch_size, seed, steps):
    order = MixedOrder(*mixture, batch_size, seed)
    pairs = stream(MixedOrder(*mixture, 1, seed), 21 * batch_size)
    for step in steps:
        assert pairs_of(*order.batch(step)) == pairs[step * batch_size : (step + 1) * batch_size]


def test_weights_equal_to_the_sizes_are_plain_shuffling():
    groups = grouped([7, 20, 3])
    order = MixedOrder(groups, [7, 20, 3], 10, seed=1)
    for epoch in range(5):
        epochs, indices = order.places(30 * epoch, 30)
        assert sorted(indices.tolist()) == list(range(30))
        assert set(epochs.tolist()) == {epoch}
    one = MixedOrder([(0, 30)], [0.3], 10, seed=1)
    assert sorted(one.places(30, 30)[1].tolist()) == list(range(30))


@pytest.mark.parametrize(
    ("counts", "weights", "shares"),
    [
        ([10, 90], [0.5, 0.5], [50, 50]),
        ([10, 90], [1e-2, 1e-2], [50, 50]),
        ([5, 5], [1, 2], [3, 7]),
        ([4, 3, 3], [1, 1, 1], [4, 3, 3]),
        ([50, 50], [0.1, 0.2], [33, 67]),
        ([1, 1], [1e308, 1e308], [1, 1]),
    ],
)
def test_shares_sum_to_the_epoch_and_go_by_the_largest_remainder(counts, weights, shares):
    assert MixedOrder(grouped(counts), weights, 4, 0).shares == shares


def test_the_groups_are_mixed_within_an_epoch():
    order = MixedOrder(grouped([500, 500]), [1, 1], 100, seed=3)
    for step in range(10):
        assert 30 < (order.batch(step)[1] < 500).sum() < 70


def test_every_record_of_a_small_group_comes_first_equally_often():
    order = MixedOrder(grouped([10, 10]), [1, 1], 20, seed=3)
    first = np.zeros(10)
    for epoch in range(1000):
        indices = order.batch(epoch)[1]
        first[indices[indices < 10][0]] += 1
    chi_square = ((first - 100) ** 2 / 100).sum()
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_the_order_of_a_seed_never_changes_between_versions():
    epochs, indices = MixedOrder(grouped([2, 6]), [1, 1], 16, seed=2024).batch(0)
    assert epochs.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 2, 2, 0, 1, 3, 1, 3]
    assert indices.tolist() == [2, 5, 1, 0, 6, 4, 1, 0, 3, 1, 0, 7, 6, 0, 3, 1]


def test_seeds_epochs_and_groups_differ():
    streams = {tuple(MixedOrder(grouped([50, 50]), [1, 1], 1, seed).places(0, 100)[1]) for seed in (1, 2)}
    order = MixedOrder(grouped([50, 50]), [1, 1], 1, 1)
    streams.add(tuple(order.places(100, 100)[1]))
    assert len(streams) == 3
    indices = order.places(0, 100)[1]
    assert indices[indices < 50].tolist() != (indices[indices >= 50] - 50).tolist()


def test_groups_may_be_named_in_any_order():
    order = MixedOrder([(6, 4), (0, 6)], [1, 3], 10, seed=5)
    assert order.shares == [3, 7]
    indices = order.batch(0)[1]
    assert ((indices >= 6).sum(), (indices < 6).sum()) == (3, 7)
    assert all(order.substitute(0, index, 0) >= 6 for index in (6, 9))


@settings(max_examples=60)
@given(st.data(), mixtures(), seeds, st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_a_substitute_is_of_the_same_group_and_the_same_one_every_time(data, mixture, seed, epoch, attempt):
    groups, _ = mixture
    order = MixedOrder(*mixture, 4, seed)
    index = data.draw(st.integers(0, order.num_samples - 1))
    group = group_of(groups, index)
    candidate = order.substitute(epoch, index, attempt)
    assert group_of(groups, candidate) == group
    assert candidate != index or groups[group][1] == 1
    assert candidate == MixedOrder(*mixture, 8, seed).substitute(epoch, index, attempt)


def test_an_index_out_of_range_has_no_substitute():
    order = MixedOrder(grouped([3, 4]), [1, 1], 4, 0)
    for index in (-1, 7):
        with pytest.raises(ValueError, match=f"got {index}"):
            order.substitute(0, index, 0)


def test_at_most_two_layouts_are_kept_and_none_is_pickled():
    order = MixedOrder(grouped([4_000, 6_000]), [1, 1], 4_000, 0)
    for step in [*range(12), 3, 11]:
        order.batch(step)
        assert 1 <= len(order._layouts) <= 2
    data = pickle.dumps(order)
    assert len(data) < 3000
    assert pairs_of(*pickle.loads(data).batch(2)) == pairs_of(*order.batch(2))


def test_it_stands_where_a_sample_order_stands():
    order: SampleOrder = MixedOrder(grouped([5, 5]), [1, 1], 12, 0)
    assert isinstance(order, SampleOrder)
    with pytest.raises(UsageError, match=r"batch_size 12 must be a multiple of .* = 4 x 2 = 8"):
        order.share(0, 0, 4, 0, 2)
    with pytest.raises(ValueError, match="step must be >= 0"):
        order.batch(-1)


@pytest.mark.parametrize("groups", [[], [(0, 0)], [(1, 3)], [(0, 3), (2, 3)], [(0, 3), (4, 3)]])
def test_groups_that_do_not_hold_each_record_once_are_errors(groups):
    with pytest.raises(ValueError, match="groups must"):
        MixedOrder(groups, [1.0] * len(groups), 4, 0)


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")], [1, 1, 1]])
def test_weights_that_are_no_weights_are_errors(weights):
    with pytest.raises(ValueError, match="weights must be 2 positive numbers"):
        MixedOrder(grouped([3, 4]), weights, 4, 0)


def test_a_weight_that_gives_no_place_is_a_usage_error_with_the_records():
    with pytest.raises(UsageError, match=r"weight 0\.001 gives none of 10 samples .* records 5 \.\. 9"):
        MixedOrder(grouped([5, 5]), [1, 1e-3], 4, 0)
