"""A small recogniser learns to read rendered digits; a run of it that is killed goes on as the same run."""

import os
import signal
from pathlib import Path

import pytest
from finetune_runs import kill_at, validation
from pretrain_runs import curve

from benchmarks.value import SIZES
from benchmarks.value_data import rendered_digits
from lmim_fast import cli
from lmim_fast.train.telemetry import Telemetry

STEPS, KILLED, STOPPED = 5091, 450, 600  # these steps and this seed were measured to reach 92.8 %


def arguments(train: list[str], held_out: str, run: Path) -> list[str]:
    """A run of ten minutes on one core, from random weights."""
    return [
        *("--preset", "tiny", "--data", *train, "--val", held_out, "--output", str(run), "--device", "cpu"),
        *("--steps", str(STEPS), "--optim.warmup-steps", "254", "--seed", "1", "--checkpoint-every", "200"),
        *("--validate-every", "500", *SIZES["tiny"].finetune, "--log-every", "10"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_held_out_strings_are_read_and_a_killed_run_has_the_same_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = rendered_digits(tmp_path / "data")
    held_out = test.removeprefix("digits=")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(["finetune", *arguments(train, held_out, whole)]) == 0
    assert validation(whole)[-1]["sets"]["test"]["images"] == 1000
    assert validation(whole)[-1]["accuracy"] > 0.9

    kill_at(KILLED, arguments(train, held_out, run))
    stop = Telemetry.advance

    def advance(self: Telemetry, step: int) -> None:
        stop(self, step)
        if step == STOPPED:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Telemetry, "advance", advance)
    assert cli.main(["finetune", *arguments(train, held_out, run)]) == 0
    assert curve(run) == curve(whole)[: STOPPED // 10]
    assert validation(run) == validation(whole)[: STOPPED // 500]
