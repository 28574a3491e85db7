"""Runs under torchrun with real processes on gloo, against the same run in one process."""

import json
import subprocess
import sys

import pytest
import torch
import warm
from pretrain_runs import ENVIRONMENT, curve, launch, lines, options, weights_of, write_lmdb

from lmim_fast import cli

STEPS = 6

# One rank is made to fail in a given way; the rest is the real command line.
SCRIPT = """
import os, sys
from lmim_fast import cli
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.errors import DataError
from lmim_fast.models.mae import MAE

kind, rank = sys.argv[1], os.environ["RANK"]
if kind == "nan" and rank == "1":
    forward, calls = MAE.forward, []
    def poisoned(self, images, noise=None, *, patches=None):
        calls.append(1)
        output = forward(self, images, noise, patches=patches)
        if len(calls) == 3:
            output.loss = output.loss * float("nan")
        return output
    MAE.forward = poisoned
if kind == "no pipeline" and rank == "1":
    def refusing(self, *parts, **more):
        raise DataError("no pipeline here")
    ViewPipeline.__init__ = refusing
if kind == "broken" and rank == "1":
    following, calls = ViewPipeline.__next__, []
    def breaking(self):
        calls.append(1)
        if len(calls) == 3:
            raise DataError("record 17 of rank 1 is broken")
        return following(self)
    ViewPipeline.__next__ = breaking
sys.exit(cli.main(["pretrain", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 30)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """The run in one process, on one thread as torchrun's processes."""
    run = tmp_path_factory.mktemp("runs") / "one"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main(["pretrain", *options(data, run, steps=STEPS)]) == 0
    finally:
        torch.set_num_threads(before)
    return run


def assert_close(run, other):
    for found, wanted in zip(lines(run), lines(other), strict=True):
        assert found["step"] == wanted["step"]
        assert found["lr"] == wanted["lr"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)


def torchrun_script(tmp_path, kind, arguments):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, str(script), kind, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_r21_two_processes_give_the_curve_of_one_and_one_process_can_continue_them(data, one, tmp_path):
    run = tmp_path / "two"
    ranks = warm.finish(["pretrain", *options(data, run, "--accumulation", "2", steps=STEPS)])
    assert_close(run, one)
    assert [rank.stdout.count("learning rate: ") for rank in ranks] == [1, 0]  # only the first rank talks
    for folder in (run / "checkpoints").glob("step-00000006"):  # go back to step 4 and finish it alone
        folder.rename(tmp_path / folder.name)
    before = curve(run)
    assert cli.main(["pretrain", *options(data, run, "--accumulation", "2", steps=STEPS)]) == 0
    assert curve(run)[:4] == before[:4]
    assert_close(run, one)


@pytest.mark.slow
def test_r21_two_processes_give_the_lmim_curve_of_one_where_there_is_no_dropout(data, tmp_path, one_thread):
    # With dropout they do not: its draws depend on the rank.
    more = ("--teacher", "random", "--model.decoder-dropout", "0")
    alone, run = tmp_path / "one", tmp_path / "two"
    assert cli.main(["pretrain", *options(data, alone, *more, objective="lmim", steps=STEPS)]) == 0
    done = launch(options(data, run, *more, objective="lmim", steps=STEPS), processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(run, alone)
    for found, wanted in zip(lines(run), lines(alone), strict=True):
        assert found["loss_align"] == pytest.approx(wanted["loss_align"], rel=1e-5)


@pytest.mark.slow
def test_r10_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_both(data, tmp_path):
    run = tmp_path / "run"
    process = torchrun_script(tmp_path, "nan", options(data, run, steps=STEPS))
    assert process.returncode == 0, process.stderr
    found = lines(run)
    assert [line["loss"] is None for line in found] == [False, False, True, False, False, False]
    assert found[-1]["skipped_steps"] == 1
    assert [json.loads(text)["step"] for text in (run / "skipped.jsonl").read_text().splitlines()] == [3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"), [("broken", "record 17 of rank 1 is broken"), ("no pipeline", "no pipeline here")]
)
def test_a_failure_on_one_rank_ends_all_and_is_told_once(data, tmp_path, kind, message):
    process = torchrun_script(tmp_path, kind, options(data, tmp_path / "run", steps=STEPS))
    assert process.returncode == 1
    assert process.stderr.count("error: ") == process.stderr.count(f"error: {message} (rank 1)\n") == 1


@pytest.mark.slow
def test_r21_python_and_torchrun_with_one_process_are_bitwise_equal(data, one, tmp_path):
    for name, processes in (("python", None), ("torchrun", 1)):
        run = tmp_path / name
        done = launch(options(data, run, steps=STEPS), processes=processes)
        assert done.returncode == 0, done.stderr
        assert curve(run) == curve(one)
        assert weights_of(run, STEPS) == weights_of(one, STEPS)
