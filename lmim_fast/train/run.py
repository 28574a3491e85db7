"""Pre-training: `python -m lmim_fast.pretrain`, or `torchrun --nproc-per-node=N -m lmim_fast.pretrain`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmim_fast.config import PretrainConfig
from lmim_fast.config.io import config_hash, to_dict
from lmim_fast.data.order import SampleOrder
from lmim_fast.data.pipeline import ViewPipeline
from lmim_fast.data.store.databases import find_databases
from lmim_fast.data.store.records import RecordStore
from lmim_fast.errors import DataError, UsageError
from lmim_fast.models.lmim import LMIM
from lmim_fast.train import optim
from lmim_fast.train import world as worlds
from lmim_fast.train.checkpoint import content, folders, resume
from lmim_fast.train.checkpoint.files import write_file
from lmim_fast.train.checkpoint.folders import Checkpoint
from lmim_fast.train.export import write_encoder
from lmim_fast.train.loop import Progress, Session, train
from lmim_fast.train.start import build_model, check_teacher, load_starting_weights, versions
from lmim_fast.train.step import TrainStep, blank_batch
from lmim_fast.train.telemetry import Meter, Telemetry
from lmim_fast.train.world import World

Tell = Callable[[str], None]


def run_pretrain(config: PretrainConfig) -> Path:
    """Run one pre-training, or what is left of it; under torchrun every process calls this.

    Returns:
        The run folder: config.json, metrics.jsonl, checkpoints/, tensorboard/ and, when the run is complete,
        encoder.safetensors. After SIGTERM or SIGUSR1 it comes early, with a checkpoint to continue from.
    Raises:
        UsageError: a wrong setting or path, or a run folder of other settings.
        LmimError: data, weights, disk or training failed; the message says how to go on.
        KeyboardInterrupt: Ctrl-C, after a checkpoint.
    """
    check_teacher(config)
    with worlds.join(config.device) as world:
        config = world.together(lambda: _resolved(config, world))
        return _run(config, world, _say if world.is_main else _say_nothing)


def _run(config: PretrainConfig, world: World, tell: Tell) -> Path:
    # What can fail on one rank runs `together`: the others then end with its message and do not wait for it.
    run = Path(config.output)
    store = world.together(lambda: _open_records(config))
    order = SampleOrder(len(store), config.batch_size, config.seed)
    identity: dict[str, Any] = {
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "versions": versions(),
        "data": world.together(store.fingerprint),
        "seed": config.seed,
    }
    saved = resume.find(run, config, identity["data"], world, tell)

    model = world.together(lambda: _model(config, run, saved, tell))
    world.main_only(lambda: _prepare_folder(run, identity))
    stored = world.together(lambda: content.save_teacher(run, model) if world.is_main and not saved else None)
    identity["teacher"] = saved.state["teacher"] if saved else world.gather(stored)[0]

    world.together(lambda: model.to(world.device))
    if config.precision == "bf16" and isinstance(model, LMIM):
        model.teacher_to_bf16()
    graphed = world.device if config.cuda_graph else None
    optimizer = optim.make_optimizer(model, config.optim, graphed=graphed)
    progress = Progress(Meter())
    if saved is not None:
        progress = world.together(partial(_restore, saved, model, optimizer, world.device))
        saved = None  # frees the host's copy of weights and moments
        tell(f"continuing {run} from step {progress.step}")
    _summarise(config, world, model, store, tell)

    total = optim.total_steps(config, len(store))
    guided = config.objective == "lmim" and config.model.guidance
    make_telemetry = partial(Telemetry, run if world.is_main else None, total=total, start_step=progress.step)
    make_batches = partial(
        ViewPipeline,
        store,
        order,
        guidance=config.view if guided else None,
        loader=config.loader,
        seed=config.seed,
        image_size=config.model.image_size,
        rank=world.rank,
        world_size=world.size,
        accumulation=config.accumulation,
        device=world.device,
        start_step=progress.step,
        end_step=total,
    )
    run_step = world.together(lambda: _make_step(config, model, optimizer, world))
    with contextlib.ExitStack() as stack:  # closes also what was made while another rank failed
        telemetry = world.together(lambda: stack.enter_context(make_telemetry()))
        batches = world.together(lambda: stack.enter_context(make_batches()))
        session = Session(
            config, run, world, model, optimizer, run_step, order, progress, telemetry, identity
        )
        stopped_by = train(session, batches)

    if stopped_by:
        name = signal.Signals(stopped_by).name
        tell(f"stopped by {name} after step {progress.step} of {total}; the same command continues the run")
        if stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        return run
    world.main_only(lambda: write_encoder(model, run / "encoder.safetensors"))
    if session.bad_records:
        tell(f"{session.bad_records} broken records were replaced by others: {run / 'bad_records.jsonl'}")
    tell(f"finished: {run}, encoder in {run / 'encoder.safetensors'}")
    return run


def _resolved(config: PretrainConfig, world: World) -> PretrainConfig:
    """The config with "auto" precision settled, checked against the number of processes."""
    if config.batch_size % (world.size * config.accumulation):
        raise UsageError(
            f"--batch-size {config.batch_size} must be a multiple of {world.size} processes "
            f"x {config.accumulation} accumulation passes"
        )
    if config.cuda_graph and (world.size > 1 or world.device.type != "cuda"):
        raise UsageError(
            f"--cuda-graph is for one process on CUDA, not for {world.size} on {world.device.type}: drop it"
        )
    if config.precision != "auto":
        return config
    return dataclasses.replace(config, precision="bf16" if world.device.type == "cuda" else "fp32")


def _make_step(
    config: PretrainConfig, model: nn.Module, optimizer: optim.SkippingAdamW, world: World
) -> TrainStep:
    step = TrainStep(model.train(), optimizer, config, world)
    if config.cuda_graph:
        step.capture_graph(blank_batch(config, world.device))
    return step


def _open_records(config: PretrainConfig) -> RecordStore:
    try:
        find_databases(config.data)
    except DataError as error:  # a path that holds no data is a wrong option; damaged data is not
        raise UsageError(f"--data {error}") from error
    return RecordStore(config.data, max_pixels=config.loader.max_pixels)


def _model(config: PretrainConfig, run: Path, saved: Checkpoint | None, tell: Tell) -> nn.Module:
    """The model on the CPU; a saved run brings its own teacher and, later, its student."""
    model = build_model(config)
    if saved is None:
        load_starting_weights(config, model, tell)
    else:
        content.load_teacher(run, saved.state["teacher"], model)
        for option in ("teacher", "init"):
            now = getattr(config, option)
            if now is not None and now != saved.state["config"][option]:
                tell(f"--{option} {now} is not read: the run keeps the weights that it has")
    return model


def _restore(
    saved: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Progress:
    content.restore(saved, model, optimizer)
    return Progress.from_state(saved.state, device)


def _prepare_folder(run: Path, identity: dict[str, Any]) -> None:
    """Make the run folder, clear what an interrupted save left, and write down what the run is."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {run}: cannot be made ({error.strerror})") from error
    for folder in (run, run / "checkpoints", run / "tensorboard"):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--output {run}: {folder} is in the way, it should be a folder")
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"--output {run}: no permission to write in {folder}")
    folders.remove_unfinished(run)
    content = {name: identity[name] for name in ("config", "versions", "data")}
    write_file(run / "config.json", json.dumps(content, indent=1).encode())


def _summarise(
    config: PretrainConfig, world: World, model: nn.Module, store: RecordStore, tell: Tell
) -> None:
    """What is about to be done, in a few lines."""
    total, warmup = optim.total_steps(config, len(store)), optim.warmup_steps(config, len(store))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    passes = world.size * config.accumulation
    share = f"{world.size} x {config.accumulation} x {config.batch_size // passes}"
    rule = "" if config.optim.lr is not None else f" = {config.optim.base_lr:g} x {config.batch_size} / 256"
    tell(
        f"{config.objective}, {config.preset} preset: {trainable:,} trainable parameters, "
        f"{config.precision} on {world.device}"
    )
    tell(f"data: {len(store):,} records, {len(store.databases)} LMDB")
    tell(f"batch: {config.batch_size} (processes x passes x images: {share})")
    tell(f"steps: {total:,} = {total * config.batch_size / len(store):.2f} epochs, warm-up {warmup:,}")
    tell(f"learning rate: {optim.peak_learning_rate(config):g}{rule}")
    if warmup >= total:
        tell(f"warning: the warm-up of {warmup} steps never ends in {total}; pass --optim.warmup-steps")


def _say(text: str) -> None:
    print(text, flush=True)


def _say_nothing(text: str) -> None:
    """Ranks other than 0."""
