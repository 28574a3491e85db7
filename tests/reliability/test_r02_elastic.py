"""R2: processes, sharding and threads may change at a resume; order, views and losses do not.

Real runs of the command line on a real LMDB, without dropout, whose draws depend on the rank. Losses of a run
whose shape changed are those of the run in one process within the rounding of another order of sums, which
the steps carry on: `LOSS` of each loss, `NORM` of the norm of its gradient.
"""

import pytest
from pretrain_runs import lines, options, write_lmdb
from sittings import Sittings

from lmim_fast.data.order import SampleOrder
from lmim_fast.train.checkpoint import folders

RECORDS, BATCH = 30, 8  # 3.75 steps an epoch: almost every stop is in its middle
LOSS, NORM = 1e-5, 1e-3
LOSSES = ("loss", "loss_recon", "loss_align")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", RECORDS)


@pytest.fixture
def begin(data, tmp_path):
    """Start a run of so many steps under a name; its folder and its sittings."""

    def start(name, steps):
        run = tmp_path / name
        more = ("--teacher", "random", "--model.decoder-dropout", "0", "--optim.clip-norm", "1.0")
        arguments = options(data, run, *more, "--checkpoint-every", "4", objective="lmim", steps=steps)
        return run, Sittings(tmp_path / f"{name} recorded", ["pretrain", *arguments])

    return start


def assert_order(sittings, whole, steps):
    """The samples are those of the order's definition, with the views and masks of the other run."""
    samples = sittings.samples()
    assert samples == whole.samples()
    order = SampleOrder(RECORDS, BATCH, 0)
    pairs = [pair for step in range(steps) for pair in zip(*map(list, order.batch(step)), strict=True)]
    assert [tuple(sample[:2]) for sample in samples] == pairs


def assert_losses(run, other):
    largest = {
        name: max(abs(a[name] / b[name] - 1) for a, b in zip(lines(run), lines(other), strict=True))
        for name in (*LOSSES, "grad_norm")
    }
    print("largest relative differences:", {name: f"{value:.1e}" for name, value in largest.items()})
    for found, wanted in zip(lines(run), lines(other), strict=True):
        assert (found["step"], found["lr"]) == (wanted["step"], wanted["lr"])
        assert found["skipped_steps"] == found["bad_records"] == 0
        for name in LOSSES:
            assert found[name] == pytest.approx(wanted[name], rel=LOSS), (found["step"], name)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=NORM), found["step"]


def test_r02_one_process_then_two_then_one_see_the_samples_of_the_run_that_never_stopped(begin):
    whole, unbroken = begin("whole", 9)
    unbroken.sit()
    run, sittings = begin("run", 9)
    sittings.sit(steps=3)
    sittings.sit("--loader.threads", "2", processes=2, steps=3)
    sittings.sit("--accumulation", "2")
    assert_order(sittings, unbroken, 9)
    assert_losses(run, whole)


@pytest.mark.slow
def test_r02_world_sizes_1_2_1_2_with_a_kill_in_each_keep_order_and_losses(begin):
    whole, unbroken = begin("whole", 24)
    unbroken.sit()
    run, sittings = begin("run", 24)
    sittings.sit(steps=3)
    sittings.sit("--loader.threads", "2", processes=2, killed=3)
    sittings.sit("--loader.threads", "3", "--loader.prefetch", "4", processes=2, steps=4)
    sittings.sit("--loader.threads", "2", killed=4)
    sittings.sit("--accumulation", "2", steps=5)
    sittings.sit("--accumulation", "2", processes=2)
    assert_order(sittings, unbroken, 24)
    assert_losses(run, whole)


@pytest.mark.slow
def test_r02_replicated_then_sharded_twice_with_both_layouts_keeps_order_and_losses(begin):
    whole, unbroken = begin("whole", 20)
    unbroken.sit()
    run, sittings = begin("run", 20)
    shard = ("--parallel", "shard", "--checkpoint-layout", "sharded")
    sittings.sit("--parallel", "replicate", processes=2, steps=3)
    sittings.sit(*shard, "--loader.threads", "2", processes=2, killed=4)
    sittings.sit(*shard, "--reshard", processes=2, steps=3)
    assert folders.is_sharded(folders.verify(folders.latest(run)))
    sittings.sit("--parallel", "replicate", "--checkpoint-layout", "whole", processes=2, steps=5)
    assert not folders.is_sharded(folders.verify(folders.latest(run)))
    sittings.sit(*shard, "--activation-checkpointing", "--loader.threads", "3", processes=2)
    assert_order(sittings, unbroken, 20)
    assert_losses(run, whole)
