"""The training loop, from top to bottom. A step is a function of (weights, optimiser, seed, step)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch

from lmim_fast import faults
from lmim_fast.data.batch import Batch
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.errors import LmimError
from lmim_fast.train import optim, parallel
from lmim_fast.train.checkpoint.saver import SLOWEST
from lmim_fast.train.memory import explain_out_of_memory
from lmim_fast.train.session import Clock, Session
from lmim_fast.train.side_files import BAD_RECORDS_FILE, SKIPPED_FILE, add_new_lines, flush
from lmim_fast.train.signals import name_of, stop_signals
from lmim_fast.train.telemetry import Value, memory_bytes
from lmim_fast.train.world import answered

# A bad batch or two pass; a run that diverged does not come back.
MAX_SKIPPED_IN_A_ROW = 20
MAX_TIME = "--max-time"
_LOOK_EVERY = 0.05  # seconds, while a checkpoint is waited for


def train(session: Session, batches: ViewPipeline) -> str | None:
    """Train from `session.progress.step` to the end of the run, which is saved when this returns.

    Args:
        batches: micro batches in training order, from that step on.
    Returns:
        None when the run is complete, or what stopped it: a signal's name, `signals.name_of`, or `MAX_TIME`.
    Raises:
        LmimError: the run folder has another owner now, too many steps in a row were not finite, or a part
            failed on some rank.
    """
    config, world, progress, telemetry = session.config, session.world, session.progress, session.telemetry
    total = optim.total_steps(config, session.order.num_samples)
    warmup = optim.warmup_steps(config, session.order.num_samples)
    peak = optim.peak_learning_rate(config)
    schedule, final = config.optim.schedule, config.optim.final_lr
    clock = Clock(progress.seconds)

    def others() -> Iterator[Batch]:
        for _ in range(1, config.accumulation):
            yield clock.count(_next_batch(session, batches)[0])

    with stop_signals() as stop:
        while progress.step < total:
            step = progress.step
            late = config.max_time is not None and clock.sitting() > 3600 * config.max_time
            taken = session.owner is not None and session.owner.lost
            own = stop.received, late, session.saver.failed, taken
            batch, (number, time_is_up, unsaved, taken_anywhere) = _next_batch(session, batches, *own)
            if taken_anywhere:
                _check_owner(session)
            if unsaved:
                with world.together():
                    session.saver.check()
            if number or time_is_up:
                _end(session, batches, clock)
                return name_of(number) if number else MAX_TIME
            lr = optim.learning_rate(
                step, peak=peak, warmup=warmup, total=total, schedule=schedule, final=final
            )
            try:
                faults.point("step")
                with answered():  # FSDP talks to the peers by itself
                    row = session.run_step(step, itertools.chain([clock.count(batch)], others()), lr)
            except torch.OutOfMemoryError as error:
                told = error, session.run, session.run_step.task, session.model, config, world
                raise explain_out_of_memory(*told) from error

            progress.step, session.score = step + 1, None
            progress.meter.add(progress.step, row)
            clock.steps += 1
            telemetry.advance(progress.step)
            session.watchdog.beat(f"step {progress.step}")
            session.trace.step()
            look = progress.step % config.log_every == 0 or progress.step == total
            if look or progress.step % MAX_SKIPPED_IN_A_ROW == 0:  # the device is waited for no oftener
                lost = progress.meter.longest_skipped()
                if look or lost >= MAX_SKIPPED_IN_A_ROW:
                    _log(session, batches, clock, lr)
                _stop_if_lost(session, lost, total)
            _measure(session, total)
            if progress.step % config.checkpoint_every == 0:
                _save(session, batches, clock)
            for path in session.saver.published():
                telemetry.say(f"checkpoint {path}")
        _stop_if_lost(session, progress.meter.longest_skipped(), total)  # it may have been complete before
        _end(session, batches, clock)
    return None


def _stop_if_lost(session: Session, lost: int, total: int) -> None:
    """Stop a run that no longer trains.

    Args:
        lost: most skipped steps in a row since the last look.
    Raises:
        LmimError: they are too many, or the run is over and none of its steps was a good one.
    """
    step = session.progress.step
    if lost >= min(MAX_SKIPPED_IN_A_ROW, total):
        raise LmimError(
            f"loss or gradient was not finite in {lost} steps in a row up to step {step}, which trained "
            "nothing: start again in another --output with a lower --optim.lr, --optim.clip-norm or "
            f"--precision fp32; the steps are listed in {session.run / SKIPPED_FILE}"
        )


def _end(session: Session, batches: ViewPipeline, clock: Clock) -> None:
    """Save the last step, and wait until that is on the disk."""
    if session.saved_step != session.progress.step:
        _save(session, batches, clock)
    _await_save(session)
    with session.world.together():
        session.saver.wait()
    for path in session.saver.published():
        session.telemetry.say(f"checkpoint {path}")


def _check_owner(session: Session) -> None:
    """Nothing is written into a folder that another process has by now."""
    with session.world.together():
        if session.owner is not None:
            session.owner.check()


def _next_batch(session: Session, batches: ViewPipeline, *values: int) -> tuple[Batch, list[int]]:
    """The next batch, and the largest of each value over the ranks, by the same message.

    Where there is no batch on some rank, all raise, after the broken records are named.
    """
    try:
        with session.world.together(*values) as agreed:
            batch = next(batches)
        return batch, agreed
    except Exception:
        try:
            _name_bad_records(session, batches)
        except LmimError as problem:  # not worth hiding the failure for
            session.telemetry.say(f"warning: {problem}")
        raise


def _log(session: Session, batches: ViewPipeline, clock: Clock, lr: float) -> None:
    """Read the window's numbers and write their line."""
    config, world, progress = session.config, session.world, session.progress
    means, skipped = progress.meter.close_window()
    steps_per_second, data_wait = clock.close_window()
    _name_bad_records(session, batches)
    line: dict[str, Value] = {
        "step": progress.step,
        "epoch": progress.step * config.batch_size / session.order.num_samples,
        **means,
        "lr": lr,
        "images_per_second": steps_per_second * config.batch_size,
        "data_wait_fraction": data_wait,
        "bad_records": session.bad_records,
        "skipped_steps": progress.meter.skipped,
        "memory_bytes": memory_bytes(world.device),
        "elapsed_seconds": clock.elapsed(),
    }
    with world.together():
        if world.is_main:
            _write(session, line, skipped)


def _measure(session: Session, total: int) -> None:
    """Measure what is due: the averaged weights if there are any."""
    step, held_out, validation = session.progress.step, session.held_out, session.validation
    due = held_out is not None and held_out.is_due(step, total)
    validated = validation is not None and validation.is_due(step, total)
    if not (due or validated):
        return
    with session.watchdog.pause("measuring"), optim.averaged_weights(session.optimizer):
        if held_out is not None and due:
            losses = held_out(session.model, step)
            with session.world.together():
                session.telemetry.held_out(losses)
            session.score = losses[session.telemetry.loss_names[0]]
        if validation is not None and validated:
            with session.world.together():
                faults.point("evaluation")
                whole = parallel.whole(session.model, session.run_step.task, session.world)
            line = validation(whole, step)
            with session.world.together():
                session.telemetry.validated(line)


def _name_bad_records(session: Session, batches: ViewPipeline) -> None:
    """Name and count the broken records that the ranks have met since the last time; all ranks call it."""
    known = list(batches.bad.entries)  # it grows meanwhile
    new, session.bad_named = known[session.bad_named :], len(known)
    ranks = session.world.gather((batches.bad.count, new))
    with session.world.together():
        if session.world.is_main:
            entries = [entry._asdict() for _, entries in ranks for entry in entries]
            named = add_new_lines(session.run / BAD_RECORDS_FILE, entries)
            session.bad_records = max(named, *(count for count, _ in ranks))


def _write(session: Session, line: dict[str, Value], skipped: list[int]) -> None:
    """Write one line of metrics, and name the skipped ones of its steps."""
    session.telemetry.log(line)
    if skipped:
        # Seed, epoch and index are what a sample's views and mask are a function of.
        order = session.order
        samples = {step: [array.tolist() for array in order.batch(step - 1)] for step in skipped}
        add_new_lines(
            session.run / SKIPPED_FILE,
            [
                {"step": step, "seed": order.seed, "epochs": epochs, "indices": indices}
                for step, (epochs, indices) in samples.items()
            ],
        )
        session.telemetry.say(
            f"warning: skipped {len(skipped)} steps whose loss or gradient was not finite; "
            f"to see a sample of skipped.jsonl: `lmim data inspect --run {session.run} "
            "--replay SEED EPOCH INDEX`"
        )


def _save(session: Session, batches: ViewPipeline, clock: Clock) -> None:
    """Name the broken records known by now, and begin a checkpoint; training waits for a copy only."""
    _check_owner(session)
    _name_bad_records(session, batches)
    with session.world.together():
        if session.world.is_main:
            flush(session.run)  # a resume counts on the lines before it
    progress = session.progress
    session.saved_step = progress.step
    state = {
        **session.identity,
        "step": progress.step,
        "meter": progress.meter.state(),
        "seconds": clock.elapsed(),
        "score": session.score,
    }
    _await_save(session)
    session.saver.save(state, session.model, session.optimizer)


def _await_save(session: Session) -> None:
    """Wait for the checkpoint in flight: a slow disk is no hung process, unless it is slower than all reason.

    Raises:
        LmimError: on every rank, if it takes longer than `SLOWEST`.
    """
    end = time.monotonic() + SLOWEST
    writing, late = session.world.largest(session.saver.writing, time.monotonic() > end)
    while writing:
        if late:
            raise LmimError(f"a checkpoint was not written within {SLOWEST / 60:.0f} minutes: the disk hangs")
        time.sleep(_LOOK_EVERY)
        session.watchdog.beat("a look at the checkpoint in flight")
        writing, late = session.world.largest(session.saver.writing, time.monotonic() > end)
