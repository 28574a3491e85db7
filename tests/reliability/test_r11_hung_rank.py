"""R11: a rank that hangs is noticed, every rank says where it stands, and the group ends or is restarted."""

import time

import pytest
import warm
from fault_runs import Group, assert_same_run, finish
from pretrain_runs import options, write_lmdb

STEPS = 6
HANGS = "step@3:rank1:life0=hang"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 30)


def assert_both_ranks_said_where_they_stand(run, output):
    for rank in (0, 1):
        stacks = (run / f"stacks-rank{rank}.txt").read_text()
        assert f"rank {rank} (process " in stacks
        assert "since step 2. Stacks of its threads" in stacks
        assert "most recent call first" in stacks
        assert f"rank {rank} (process " in output
    assert "in _act" in (run / "stacks-rank1.txt").read_text()  # the sleep that was injected
    assert "in all_reduce" in (run / "stacks-rank0.txt").read_text()  # it waits for rank 1


def test_r11_a_hung_rank_and_those_that_wait_for_it_end_in_time_with_their_stacks(data, tmp_path):
    run = tmp_path / "run"
    group = warm.lmim_ranks(["pretrain", *options(data, run, "--timeout", "6", steps=STEPS)], faults=HANGS)
    group.ranks[1].wait_for("fault: hang ")
    hung = time.monotonic()
    done = group.wait(60)
    assert time.monotonic() - hung < 40  # 6 of --timeout, 15 from the stacks to the end, and some more
    assert all(rank.returncode > 0 for rank in done)  # none had to be killed
    output = "".join(rank.stdout + rank.stderr for rank in done)
    assert_both_ranks_said_where_they_stand(run, output)
    assert "step 3/" not in output


@pytest.mark.slow
def test_r11_a_hung_rank_ends_the_run_in_time_with_the_stacks_of_all_ranks(data, tmp_path):
    run = tmp_path / "run"
    with Group(options(data, run, "--timeout", "6", steps=STEPS), run, faults=HANGS) as group:
        group.wait_for("fault: hang ")
        hung = time.monotonic()
        assert group.wait(60) != 0
        assert time.monotonic() - hung < 40  # 6 of --timeout, 15 from the stacks to the end, and some more
        assert not group.processes()
        assert_both_ranks_said_where_they_stand(run, group.text)
    assert "step 3/" not in group.text


@pytest.mark.slow
def test_r11_a_group_with_a_hung_rank_is_restarted_and_finishes_with_the_same_bits(data, tmp_path):
    run = tmp_path / "run"
    arguments = options(data, run, "--timeout", "6", "--checkpoint-every", "2", steps=STEPS)
    with Group(arguments, run, restarts=1, faults=HANGS) as group:
        assert group.wait() == 0, group.text
    assert_both_ranks_said_where_they_stand(run, group.text)
    whole = tmp_path / "whole"
    assert_same_run(run, finish(options(data, whole, steps=STEPS), whole), STEPS)
