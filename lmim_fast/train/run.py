"""One training run, from its config to the weights it leaves; under torchrun every process calls it."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmim_fast import faults
from lmim_fast.config import RunConfig
from lmim_fast.config.io import config_hash, to_dict
from lmim_fast.data.store.records import Records
from lmim_fast.errors import LmimError
from lmim_fast.train import optim, parallel, run_folder, side_files
from lmim_fast.train.agreement import refuse_different, start_of
from lmim_fast.train.checkpoint import content, resume
from lmim_fast.train.checkpoint.folders import Checkpoint
from lmim_fast.train.checkpoint.saver import Saver
from lmim_fast.train.compiler import require_compiler
from lmim_fast.train.held_out import HeldOut
from lmim_fast.train.loop import train
from lmim_fast.train.memory import explain_out_of_memory
from lmim_fast.train.profiling import Trace
from lmim_fast.train.session import Progress, Session
from lmim_fast.train.start import skip_list_digest, versions
from lmim_fast.train.step import TrainStep
from lmim_fast.train.task import Task
from lmim_fast.train.tasks import make_task
from lmim_fast.train.telemetry import Meter, Telemetry
from lmim_fast.train.watchdog import COLLECTIVE_GRACE, Watchdog, flight_recorder_environment
from lmim_fast.train.weights_biases import require_wandb
from lmim_fast.train.world import World, join

Say = Callable[[str], None]


def run_training(config: RunConfig) -> Path:
    """Run one training, or what is left of it; under torchrun every process calls this.

    Returns:
        The run folder: config.json, metrics.jsonl, checkpoints/, tensorboard/ and, when the run is complete,
        encoder.safetensors or recognizer.safetensors. After SIGTERM or SIGUSR1 it comes early, with a
        checkpoint to continue from.
    Raises:
        UsageError: a wrong setting or path, or a run folder of other settings.
        LmimError: data, weights, disk or training failed; the message says how to go on.
        KeyboardInterrupt: Ctrl-C, after a checkpoint.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # one run a process: the environment names its folder
        os.environ.update(flight_recorder_environment(Path(config.output)))
    faults.arm_from_environment()
    split = config.parallel in ("shard", "hybrid")
    timeout = config.timeout + COLLECTIVE_GRACE
    agreed = start_of("training", config, versions())
    meeting = join(config.device, timeout=timeout, grouped=split, agreed=agreed)
    with contextlib.ExitStack() as outside, meeting as world:
        with world.together():
            make_task(config).check()
            require_wandb(config.wandb)
            config = parallel.resolve(config, world)
            if config.compile:
                require_compiler(world.device)
        return _run(make_task(config), world, _say if world.is_main else _say_nothing, outside)


def _run(task: Task, world: World, say: Say, outside: contextlib.ExitStack) -> Path:
    # `outside` closes after the process groups, whose end can hang too.
    # What can fail on one rank runs `together`: the others then end with its message and do not wait for it.
    config, run = task.config, Path(task.config.output)
    with world.together():
        store = task.records(say)
        order = task.order(store)
        validation = task.validation(world)
        identity = _identity(config, store)
    refuse_different(world.gather({"data": identity["data"]}))
    with world.together():
        skipped = skip_list_digest(config, store, say)
    refuse_different(world.gather({"skip list": skipped}))
    owner = run_folder.take(run, world, say, outside)
    saved = resume.find(run, config, identity["data"], world, say)

    with world.together():
        model = task.build()
        config = parallel.settle(config, model, world)
        task = make_task(config)
        if saved is None:
            task.start(model, say)
        elif world.is_main:
            _mend_teacher(task, model, run, saved, say)
    teacher = saved.state["teacher"] if saved else None
    with world.together():
        if saved is not None:
            content.load_teacher(run, saved.state["teacher"], model)
        if world.is_main:
            run_folder.describe(run, identity)
            if saved is None:
                restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
                side_files.start_afresh(run, say, restarted=restarted)
            else:
                side_files.resume_at(run, saved.state["step"], say)
            teacher = teacher or content.save_teacher(run, model)
    watchdog = outside.enter_context(Watchdog(config.timeout, run, world.rank))
    identity["teacher"] = world.gather(teacher)[0]

    with world.together():
        parallel.apply(model, config, world)
    graphed = world.device if config.cuda_graph == "on" else None
    optimizer = optim.make_optimizer(task.parameter_groups(model), config.optim, graphed=graphed)
    progress, resumed = Progress(Meter(task.loss_names)), False
    if saved is not None:
        with world.together():
            content.restore(saved, model, optimizer)
            progress = Progress.from_state(saved.state, task.loss_names, world.device)
        saved = None  # frees the host's copy of weights and moments
        resumed = True
        say(f"continuing {run} from step {progress.step}{_at_its_end(task, progress, len(store))}")
    _summarise(config, world, model, store, say)

    total, start = optim.total_steps(config, len(store)), progress.step
    with contextlib.ExitStack() as stack:  # closes also what was made while another rank failed
        with world.together(), watchdog.pause("the capture of a graph"):
            run_step = TrainStep(model.train(), optimizer, task, world)
            stack.callback(run_step.release)
            if graphed is not None:
                _capture(run_step, model, world)
        saver = stack.enter_context(
            Saver(
                run,
                world,
                keep=config.keep_checkpoints,
                keep_every=config.keep_every,
                layout=config.checkpoint_layout,
            )
        )
        with world.together():
            telemetry = stack.enter_context(
                Telemetry(
                    run if world.is_main else None,
                    task.loss_names,
                    total=total,
                    start_step=start,
                    wandb=config.wandb,
                    config=identity["config"],
                )
            )
        with world.together(), watchdog.pause("held-out views"):
            held_out = HeldOut(task, world, say) if config.eval_every else None
        with world.together():
            batches = stack.enter_context(task.pipeline(store, order, world, start, total))
        steps = config.profile if world.is_main else 0
        trace = stack.enter_context(Trace(run, world.rank, steps, world.device, telemetry.say))
        session = Session(
            *(config, run, world, model, optimizer, run_step, order, progress, telemetry, identity),
            *(saver, watchdog, trace, validation, held_out),
            saved_step=start if resumed else None,
            owner=owner,
        )
        stopped_by = train(session, batches)

    if stopped_by:
        done = f"after step {progress.step} of {total}"
        say(f"stopped by {stopped_by} {done}; the same command continues the run")
        if stopped_by == signal.SIGINT.name:
            raise KeyboardInterrupt
        return run
    with world.together(), optim.averaged_weights(optimizer):
        complete = parallel.whole(model, task, world)
        if owner is not None:
            owner.check()
            left = task.finish(complete, run, progress.step)
    if session.bad_records:
        named = run / side_files.BAD_RECORDS_FILE
        were = "record was" if session.bad_records == 1 else "records were"
        say(f"{session.bad_records} broken {were} replaced: {named}")
    if world.is_main:
        say(f"finished: {run}, {left}")
    return run


def _capture(run_step: TrainStep, model: nn.Module, world: World) -> None:
    """Capture the step as a CUDA graph, or say what to do where that is not possible."""
    task = run_step.task
    config = task.config
    try:
        run_step.capture_graph()
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, torch.OutOfMemoryError):
            cause = cause.__context__  # the end of a capture raises its own error
        if cause is not None:
            told = explain_out_of_memory(cause, Path(config.output), task, model, config, world)
            raise told from error
        traceback.clear_frames(error.__traceback__)  # they hold what was captured
        message = f"a step cannot be captured as a CUDA graph, pass --cuda-graph off: {error}"
        raise LmimError(message) from error


def _identity(config: RunConfig, store: Records) -> dict[str, Any]:
    """What config.json and every checkpoint say of the run."""
    return {
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "versions": versions(),
        "data": store.fingerprint(),
        "seed": config.seed,
    }


def _at_its_end(task: Task, progress: Progress, records: int) -> str:
    """What to know of a run that has no step left."""
    if progress.step < optim.total_steps(task.config, records):
        return ""
    if task.config.optim.schedule != "cosine":
        return ", its last one: it is finished, and its weights are written again"
    return ", its last one: it is finished; a larger --steps or --epochs lets it go on"


def _mend_teacher(task: Task, model: nn.Module, run: Path, saved: Checkpoint, say: Say) -> None:
    """A saved run brings its own teacher and student; a damaged teacher is replaced by the same one."""
    source = str(getattr(task.config, "teacher", None))
    quiet = partial(task.start_teacher, model, lambda _: None)
    mended = content.mend_teacher(run, saved.state["teacher"], model, quiet, source)
    if mended:
        say(
            f"warning: the teacher in {run} was damaged; it is written again from --teacher {source}, "
            "which has the same weights"
        )
    config = task.config
    for option in ("init",) if mended else ("teacher", "init"):
        now = getattr(config, option, None)
        if now is not None and now != saved.state["config"][option]:
            say(f"--{option} {now} is not read: the run keeps the weights that it has")


def _summarise(config: RunConfig, world: World, model: nn.Module, store: Records, say: Say) -> None:
    """What is about to be done, in a few lines."""
    total, warmup = optim.total_steps(config, len(store)), optim.warmup_steps(config, len(store))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    passes = world.size * config.accumulation
    share = f"{world.size} x {config.accumulation} x {config.batch_size // passes}"
    if world.control is not None:
        say(f"processes: {world.size}, --parallel {config.parallel}")
    rule = "" if config.optim.lr is not None else f" = {config.optim.base_lr:g} x {config.batch_size} / 256"
    say(
        f"{config.objective}, {config.preset} preset: {trainable:,} trainable parameters, "
        f"{config.precision} on {world.device}"
    )
    if config.cuda_graph == "on":
        say("each step is one CUDA graph")
    say(f"data: {len(store):,} records, {len(store.databases)} LMDB")
    say(f"batch: {config.batch_size} (processes x passes x images: {share})")
    say(f"steps: {total:,} = {total * config.batch_size / len(store):.2f} epochs, warm-up {warmup:,}")
    say(f"learning rate: {optim.peak_learning_rate(config):g}{rule}")
    if warmup >= total:
        say(f"warning: the warm-up of {warmup} steps never ends in {total}; pass --optim.warmup-steps")


def _say(text: str) -> None:
    print(text, flush=True)


def _say_nothing(text: str) -> None:
    """Ranks other than 0."""
