"""The run that is checked: its config, how its batch is shared, and what is known of it so far."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmim_fast.config import RunConfig
from lmim_fast.config.io import read_run_config
from lmim_fast.doctor.findings import Findings
from lmim_fast.doctor.machine import cores, visible_gpus
from lmim_fast.errors import LmimError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from lmim_fast.data.store.records import Records
    from lmim_fast.train.task import Task
    from lmim_fast.train.world import World


@dataclass
class Plan:
    """A run, as this process would take part in it. The parts that are None could not be made."""

    config: RunConfig
    task: Task
    world: World
    """Of one process of the run; it talks to no other."""
    continued: int
    """Steps that the run folder holds already."""
    store: Records | None = None
    model: nn.Module | None = None

    @property
    def images(self) -> int:
        """Images of one pass of one process."""
        return self.config.batch_size // (self.world.size * self.config.accumulation)

    @property
    def alone(self) -> World:
        """The world of this process without the others."""
        return dataclasses.replace(self.world, size=1)


def load_config(place: str) -> RunConfig:
    """The config of a run, from its folder or its config.json; of a folder, that is the run folder.

    Raises:
        UsageError: there is no such file.
        LmimError:  it cannot be read or used.
    """
    path = Path(place)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{file} does not exist; give the folder of a run, or its config.json")
    try:
        config, _ = read_run_config(file)
    except OSError as error:
        raise LmimError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise LmimError(str(error)) from error
    # A run folder may have moved since.
    return dataclasses.replace(config, output=place) if path.is_dir() else config


def make_plan(config: RunConfig, processes: int, findings: Findings) -> Plan | None:
    """Settle the config for this machine; None, with an error line, where that cannot be done."""
    with findings.check("config"):
        import torch

        from lmim_fast.train import parallel
        from lmim_fast.train.checkpoint import folders
        from lmim_fast.train.tasks import make_task
        from lmim_fast.train.world import World

        gpus = visible_gpus()
        if config.device == "cuda" and not gpus:
            findings.error("config", "--device cuda, and there is no GPU here", "pass --device auto or cpu")
        on_gpu = config.device != "cpu" and gpus > 0
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        size = processes or (gpus if on_gpu else 1)
        if config.batch_size % (size * config.accumulation):
            text = f"--batch-size {config.batch_size} is no multiple of {size} x {config.accumulation}"
            findings.error(
                "config", f"{text} (processes x passes); what follows is of one process", "change one"
            )
            size = 1
        # The threads that one of the run's processes takes on this machine.
        threads = config.loader.threads or max(1, int(cores()) // size)
        config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, threads=threads))
        world = World(0, size, device, local_size=size)
        task = make_task(parallel.resolve(config, world))
        plan = Plan(task.config, task, world, max(folders.steps(Path(config.output)), default=0))
        shares = f"{size} x {config.accumulation} x {plan.images}"
        what = f"{config.objective}, {config.preset} preset, {task.config.precision} on {device.type}"
        findings.ok("config", f"{what}; batch {config.batch_size} (processes x passes x images: {shares})")
        return plan
    return None
