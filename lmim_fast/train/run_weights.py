"""Weights of other runs: which file or checkpoint a path stands for, and of which step it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lmim_fast.errors import UsageError
from lmim_fast.models.weight_files import step_of
from lmim_fast.models.weight_names import Weights, printable, split_key
from lmim_fast.models.weights import read_weights
from lmim_fast.train.checkpoint import folders
from lmim_fast.train.checkpoint.folders import Checkpoint

_AVERAGE = "average."  # of the names in a checkpoint's optimiser
AVERAGED = "its averaged weights"


@dataclass(frozen=True)
class Source:
    """Weights that an option names, and what messages call the file that they are of."""

    label: str
    weights: Weights


@dataclass(frozen=True)
class Place:
    """The file, or the checkpoint, that weights are in, and what is to be said of how it was found."""

    path: Path
    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()

    def told(self) -> tuple[str, ...]:
        """What is to be said of the weights: their step, whether they are an average, how they were found."""
        if self.checkpoint is not None:
            return (*averages_told(self.checkpoint), *self.notes)
        step = step_of(split_key(self.path)[0])
        return (*([] if step is None else [f"of step {step}"]), *self.notes)


def read_source(name: str) -> Source:
    """What `--teacher` or `--init` names: `FILE`, `FILE::KEY`, a run folder or one of its checkpoint folders.

    Raises:
        UsageError: there is no such file, or the folder holds no weights.
        CheckpointError, WeightsError: they are damaged.
    """
    path, _ = split_key(name)
    if not path.exists():
        raise UsageError(f"{name} does not exist; it should be an encoder file or a run folder")
    if path.is_file():
        place = Place(Path(name))
    elif (path / folders.STATE_FILE).is_file():
        place = Place(path, folders.read(path))
    else:
        run = path.parent if path.name == "checkpoints" else path
        place = newest_of(run, run / "encoder.safetensors")
    if place.checkpoint is not None:
        return Source(str(place.path), Weights(checkpoint_tensors(place.checkpoint), place.told()))
    found = read_weights(place.path)
    return Source(str(place.path), Weights(found.state, (*place.told(), *found.notes)))


def newest_of(run: Path, export: Path) -> Place:
    """The newest weights of a run: what it exported, or a checkpoint if the run was continued after that.

    Args:
        run:    the run folder.
        export: the file that the run writes when it is finished; it need not be there.
    Raises:
        UsageError: the folder has neither.
    """
    problems = list[str]()
    newest = folders.newest(run, lambda _, error: problems.append(str(error)))
    if newest is None and not export.is_file():
        raise UsageError("; ".join([_no_weights(run, export.name), *problems]))
    if newest is None:
        return Place(export, notes=tuple(problems))
    if not export.is_file():
        why = [f"{newest.path} is the newest that is whole"] if problems else []
        return Place(newest.path, newest, (*why, *problems))
    step, made = step_of(export), newest.path / folders.STATE_FILE
    if step is not None:
        newer, told = newest.state["step"] > step, f"the export {export} is of step {step}"
    else:  # of a version that did not write the step; a copy of the folder may have lost the times
        newer = made.stat().st_mtime_ns > export.stat().st_mtime_ns
        told = f"newer than {export}, by the times of the files"
    if not newer:
        return Place(export, notes=tuple(problems))
    return Place(newest.path, newest, (f"{newest.path} is {told}" if step is None else told, *problems))


def checkpoint_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint as the run would export them: their average, where it keeps one."""
    return checkpoint.model | _averages(checkpoint.optimizer)


def averages_told(checkpoint: Checkpoint) -> list[str]:
    """What is to be said of `checkpoint_tensors`."""
    return [AVERAGED] if _averages(checkpoint.optimizer) else []


def _averages(optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(_AVERAGE): value for name, value in optimizer.items() if name.startswith(_AVERAGE)
    }


def _no_weights(folder: Path, export: str) -> str:
    suffixes = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
    files = sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)
    inside = f"; name a file in it: {', '.join(map(printable, files[:5]))}" if files else ""
    return f"{folder} has no {export} and no checkpoint: it is not the folder of a run{inside}"
