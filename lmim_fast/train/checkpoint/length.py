"""Whether a run may go on to another number of steps than it was begun with."""

from __future__ import annotations

from collections.abc import Callable

from lmim_fast.config import RunConfig
from lmim_fast.config.io import run_from_dict
from lmim_fast.errors import UsageError
from lmim_fast.train import optim
from lmim_fast.train.checkpoint.folders import Checkpoint


def check(saved: Checkpoint, config: RunConfig, records: int, say: Callable[[str], None]) -> None:
    """Refuse another number of steps, unless the run is finished and its schedule can be stretched.

    The learning rate of every step hangs on the number of steps. A finished cosine may become a longer one:
    the steps that follow have the rates of that one.

    Args:
        records: that the run trains on.
        say:     is told what the learning rate does where the run goes on.
    Raises:
        UsageError: says what can be done instead.
    """
    step, began = saved.state["step"], run_from_dict(saved.state["config"])
    old, new = optim.total_steps(began, records), optim.total_steps(config, records)
    if new == old:
        return
    run = saved.path.parent.parent
    option = _option(config, new)
    if step < old:
        raise UsageError(
            f"{run} stands at step {step} of {old}, {option} would change its learning rate half way: "
            f"go on with {_option(began, old)}, and when it is finished pass a larger number; "
            "or start anew in another --output"
        )
    if new < old:
        raise UsageError(
            f"{run} has finished its {old} steps, {option} is fewer: there is nothing left to do; "
            "for a shorter run choose another --output"
        )
    if config.optim.schedule != "cosine":
        raise UsageError(
            f"{run} has finished its {old} steps, and the schedule {config.optim.schedule} ends there: it "
            f"cannot go on to {new}; start a new run from its weights, --init {run} --output NEW, whose "
            "learning rate rises and falls again"
        )
    before, after = _rate(began, records, old - 1), _rate(config, records, old)
    say(
        f"{run} was finished after {old} steps and goes on to {new}: the learning rate goes from "
        f"{before:.3g} at step {old} to {after:.3g} at step {old + 1}, the cosine of {new} steps"
    )


def _option(config: RunConfig, total: int) -> str:
    """The option that gives this many steps."""
    if config.steps is not None:
        return f"--steps {config.steps}"
    return f"--epochs {config.epochs:g} ({total} steps)"


def _rate(config: RunConfig, records: int, done: int) -> float:
    return optim.learning_rate(
        done,
        peak=optim.peak_learning_rate(config),
        warmup=optim.warmup_steps(config, records),
        total=optim.total_steps(config, records),
        schedule=config.optim.schedule,
        final=config.optim.final_lr,
    )
