"""R1: where a run is stopped leaves no trace in its curve, its weights and its moments."""

import os
import signal

import pytest
import warm
from pretrain_runs import curve, options, weights_of, write_lmdb

from lmim_fast import cli
from lmim_fast.faults import Fault, injected
from lmim_fast.train.step import TrainStep

STEPS = 9  # of 8 images; 16 records: every second step ends an epoch


def _killed(arguments):
    differentiate, passes = TrainStep._differentiate, []

    def dying(self, batch):
        losses = differentiate(self, batch)
        passes.append((batch.step, batch.micro))
        if passes[-1] == (6, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return losses

    TrainStep._differentiate = dying
    return cli.main(["pretrain", *arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 16)


def arguments_of(data, run):
    """A run with everything that has a state: two passes a step, dropout, clipping, averaged weights."""
    more = ("--teacher", "random", "--accumulation", "2", "--optim.clip-norm", "1.0", "--log-every", "2")
    return options(data, run, *more, "--optim.ema-decay", "0.9", objective="lmim", steps=STEPS)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that was never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(["pretrain", *arguments_of(data, run)]) == 0
    return run


def assert_same_run(run, other):
    assert curve(run) == curve(other)
    assert weights_of(run, STEPS) == weights_of(other, STEPS)
    assert (run / "encoder.safetensors").read_bytes() == (other / "encoder.safetensors").read_bytes()


def test_r01_a_run_stopped_after_each_of_its_steps_is_bitwise_the_one_that_never_stopped(
    data, whole, tmp_path, capsys
):
    arguments = arguments_of(data, tmp_path / "run")
    for step in range(1, STEPS):
        with injected(Fault("step", "term", at=1)):
            assert cli.main(["pretrain", *arguments]) == 0
        assert f"stopped by SIGTERM after step {step} of {STEPS}" in capsys.readouterr().out
    assert cli.main(["pretrain", *arguments]) == 0
    assert_same_run(tmp_path / "run", whole)


def test_r01_a_run_killed_between_two_passes_of_a_step_is_bitwise_the_one_that_never_stopped(
    data, whole, tmp_path
):
    arguments = arguments_of(data, tmp_path / "run")
    done = warm.Program(_killed, arguments).wait()
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert cli.main(["pretrain", *arguments]) == 0
    assert_same_run(tmp_path / "run", whole)
