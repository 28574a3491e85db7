"""R4: signal 9 to any rank, anywhere: torchrun restarts the group, and the run ends as if it had not been."""

import random
import signal

import pytest
import warm
from fault_runs import Group, assert_same_run, curve, finish, same_bits
from pretrain_runs import options, write_lmdb

STEPS = 12
EVERY_POINT = [  # a passing in mid-run; what only rank 0 passes is killed there
    "step@7:rank1",
    "gather@2:rank1",
    "save@5:rank0",  # the second checkpoint's second file
    "commit@2:rank0",
    "retention@1:rank0",
    "batch@6:rank1",
    "evaluation@2:rank1",
]
LONG, POINTS = 40, 20
# Passings of each point, by rank, in a run of LONG steps with a checkpoint at every third and at the end.
PASSINGS = {
    "step": (LONG, LONG),
    "gather": (14, 14),
    "save": (42, 0),
    "commit": (14, 0),
    "retention": (12, 0),
    "batch": (LONG, LONG),
    "evaluation": (8, 8),
}


def drawn_points(count, seed):
    """`count` different faults, as (point, passing, rank)."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        point = draw.choice(sorted(PASSINGS))
        rank = draw.choice([rank for rank in (0, 1) if PASSINGS[point][rank]])
        found[point, draw.randint(1, PASSINGS[point][rank]), rank] = None
    return list(found)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 30)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "held_out", 8)


@pytest.fixture(scope="module")
def measured(data, held_out):
    """Options of a run that passes every point, by its folder."""

    def options_of(run, *more, steps=STEPS):
        evaluation = ("--eval-data", str(held_out), "--eval-every", "5", "--eval-images", "8")
        return options(data, run, *evaluation, "--keep-checkpoints", "1", *more, steps=steps)

    return options_of


@pytest.fixture(scope="module")
def whole(measured, tmp_path_factory):
    """The run that was never killed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    warm.finish(["pretrain", *measured(run)])
    return run


@pytest.fixture(scope="module")
def whole_long(measured, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole_long") / "run"
    return finish(measured(run, "--checkpoint-every", "3", steps=LONG), run)


def killed(arguments, run, *points):
    """A run whose group is killed at these points, one in each of its lives, to its end."""
    faults = ",".join(f"{point}:life{life}=kill" for life, point in enumerate(points))
    with Group(arguments, run, restarts=len(points), faults=faults) as group:
        assert group.wait() == 0, group.text
    assert group.text.count("fault: kill") == len(points), group.text
    return group


def test_r04_kill_9_in_a_step_is_resumed_by_torchrun_to_the_same_bits(measured, whole, tmp_path):
    run = tmp_path / "run"
    group = killed(measured(run), run, "step@7:rank1")
    assert [steps for steps, _ in group.returns()] == [2]  # from 6 back to 4
    assert_same_run(run, whole, STEPS)


def test_r04_kill_9_at_a_commit_ends_the_other_rank_too_and_the_same_command_gives_the_same_bits(
    measured, whole, tmp_path
):
    run = tmp_path / "run"
    first, second = warm.lmim_ranks(["pretrain", *measured(run)], faults="commit@2:rank0=kill").wait()
    assert first.returncode == -signal.SIGKILL
    assert second.returncode == 1, second.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "step-00000008.tmp"
    warm.finish(["pretrain", *measured(run)])
    assert_same_run(run, whole, STEPS)


@pytest.mark.slow
def test_r04_kill_9_in_a_step_and_at_a_commit_is_resumed_by_torchrun_to_the_same_bits(
    measured, whole, tmp_path
):
    run = tmp_path / "run"
    group = killed(measured(run), run, "step@7:rank1", "commit@2:rank0")
    assert [steps for steps, _ in group.returns()] == [2, 4]  # from 6 and 12 back to 4 and 8
    assert_same_run(run, whole, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("point", EVERY_POINT)
def test_r04_kill_9_at_every_point_is_resumed_by_torchrun_to_the_same_bits(measured, whole, tmp_path, point):
    run = tmp_path / "run"
    killed(measured(run), run, point)
    assert_same_run(run, whole, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["gather@2:rank1", "save@2:rank1", "save@5:rank0", "commit@2:rank0"])
def test_r04_kill_9_while_all_ranks_write_shards_is_resumed_to_the_same_bits(
    measured, whole, tmp_path, point
):
    run = tmp_path / "run"
    killed(measured(run, "--checkpoint-layout", "sharded"), run, point)
    assert_same_run(run, whole, STEPS)


@pytest.fixture(scope="module")
def table():
    """Rows of the table that the drawn kills make; -s shows it."""
    rows = []
    yield rows
    print(f"\n{'point':<11}{'passing':>8}{'rank':>6}{'steps again':>13}{'seconds':>9}  bitwise")
    for point, passing, rank, again, seconds, equal in rows:
        print(f"{point:<11}{passing:>8}{rank:>6}{again:>13}{seconds:>9.1f}  {'yes' if equal else 'NO'}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "passing", "rank"), drawn_points(POINTS, seed=4), ids=lambda value: str(value)
)
def test_r04_kill_9_at_drawn_points_loses_no_step(
    measured, whole_long, tmp_path, table, point, passing, rank
):
    run = tmp_path / "run"
    arguments = measured(run, "--checkpoint-every", "3", steps=LONG)
    group = killed(arguments, run, f"{point}@{passing}:rank{rank}")
    again, seconds = (
        group.returns()[0] if group.returns() else (0, float("nan"))
    )  # killed after the last step
    equal = curve(run) == curve(whole_long) and same_bits(run, whole_long, LONG)
    table.append((point, passing, rank, again, seconds, equal))
    assert_same_run(run, whole_long, LONG)


@pytest.mark.slow
def test_r04_kill_9_of_launcher_and_all_ranks_is_continued_by_the_same_command(measured, whole, tmp_path):
    run = tmp_path / "run"
    with Group(measured(run), run, faults="step=slow") as group:
        group.wait_for("step 6/")
        group.kill()
        assert group.wait() != 0
        assert not group.processes()
    assert "step 12/" not in group.text
    assert_same_run(finish(measured(run), run), whole, STEPS)
