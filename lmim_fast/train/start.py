"""What a run starts from: the files that `--teacher` and `--init` name, and the versions it is made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

import lmim_fast
from lmim_fast.config import RunConfig
from lmim_fast.errors import DataError, UsageError
from lmim_fast.models.weight_names import Weights, printable, split_key
from lmim_fast.models.weights import LoadReport, load_encoder, read_weights
from lmim_fast.native import native
from lmim_fast.train.checkpoint import folders
from lmim_fast.train.checkpoint.folders import Checkpoint

if TYPE_CHECKING:
    from lmim_fast.data.store.records import Records, RecordStore

RANDOM_TEACHER = "random"
NO_TEACHER = (
    "no teacher: pass --teacher FILE (an encoder from `--objective mae`, a released LMIM or MAERec file) "
    f"or --teacher {RANDOM_TEACHER} for an ablation"
)
# Those that can change a number; of each family the one that is installed.
_PACKAGES = (
    *("torch", "triton", "numpy", "lmdb", "safetensors"),
    *("opencv-python-headless", "opencv-python", "nvidia-dali-cuda120", "nvidia-dali-cuda130"),
)


def open_records(paths: Sequence[str], max_pixels: int, option: str = "--data") -> RecordStore:
    """The records of the LMDB folders that an option names.

    Raises:
        UsageError: a path holds none.
        DataError:  a database cannot be used.
    """
    from lmim_fast.data.store.databases import find_databases  # needs lmdb, which a step does not
    from lmim_fast.data.store.records import RecordStore

    try:
        find_databases(paths)
    except DataError as error:  # a path that holds no data is a wrong option; damaged data is not
        raise UsageError(f"{option} {error}") from error
    return RecordStore(paths, max_pixels=max_pixels)


def skip_list_digest(config: RunConfig, store: Records, say: Callable[[str], None]) -> str | None:
    """Check the skip list of a run and say how many records it takes out; None without one.

    Args:
        store: the records that are trained on. The list may name records of the held-out data too.
    Returns:
        what is equal for equal lists.
    Raises:
        UsageError: see `SkipList`; or a line is of a database that the run does not read.
    """
    from lmim_fast.data.skip_list import SkipList

    if config.loader.skip is None:
        return None
    skip_list = SkipList.read(config.loader.skip)
    stores: list[Records] = [store]
    if config.eval_data:
        stores.append(open_records(config.eval_data, config.loader.max_pixels, "--eval-data"))
    try:
        skip_list.check(stores)
        say(f"skip list: {len(skip_list.reasons(store)):,} of {len(store):,} records are never read")
    finally:
        for other in stores[1:]:
            other.close()
    return skip_list.digest()


@dataclass(frozen=True)
class Source:
    """Weights that an option names, and what messages call the file that they are of."""

    label: str
    weights: Weights


def read_source(name: str) -> Source:
    """What `--teacher` or `--init` names: `FILE`, `FILE::KEY`, a run folder or one of its checkpoint folders.

    Of a run folder the newest: its encoder.safetensors, or a checkpoint of a run that was continued after it.

    Raises:
        UsageError: there is no such file, or the folder holds no weights.
        CheckpointError, WeightsError: they are damaged.
    """
    path, key = split_key(name)
    if not path.exists():
        raise UsageError(f"{name} does not exist; it should be an encoder file or a run folder")
    if path.is_file():
        return Source(name, read_weights(name))
    if key is not None:
        raise UsageError(f"{name}: ::{key} is for files, {path} is a folder")
    if (path / folders.STATE_FILE).is_file():
        return _of_checkpoint(folders.read(path))
    run = path.parent if path.name == "checkpoints" else path
    export = run / "encoder.safetensors"
    problems = list[str]()
    newest = folders.newest(run, lambda _, error: problems.append(str(error)))
    if newest is None and not export.is_file():
        raise UsageError("; ".join([_no_weights(run), *problems]))
    if newest is None:
        return Source(str(export), read_weights(export))
    made = newest.path / folders.STATE_FILE
    if export.is_file() and export.stat().st_mtime_ns >= made.stat().st_mtime_ns:
        return Source(str(export), read_weights(export))
    source = _of_checkpoint(newest)
    if not export.is_file() and not problems:
        return source
    why = f"newer than {export}" if export.is_file() else "the newest that is whole"
    return Source(source.label, Weights(source.weights.state, (f"{newest.path} is {why}", *problems)))


def checkpoint_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint as the run would export them: their average, where it keeps one."""
    averages = {
        name.removeprefix("average."): value
        for name, value in checkpoint.optimizer.items()
        if name.startswith("average.")
    }
    return checkpoint.model | averages


def _of_checkpoint(checkpoint: Checkpoint) -> Source:
    return Source(str(checkpoint.path), Weights(checkpoint_tensors(checkpoint)))


def _no_weights(folder: Path) -> str:
    suffixes = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
    files = sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)
    inside = f"; name a file in it: {', '.join(map(printable, files[:5]))}" if files else ""
    return f"{folder} has no encoder.safetensors and no checkpoint: it is not the folder of a run{inside}"


def load_student(name: str, encoder: nn.Module, say: Callable[[str], None], *, whom: str = "student") -> None:
    """Load what `--init` names into the encoder that is trained, and say what it was.

    Raises:
        UsageError:   there is no such file.
        WeightsError: it does not fit; lists names and shapes.
    """
    source = read_source(name)
    report = load_encoder(source.weights, encoder, keep_positions=True, name=source.label)
    say(f"{whom} starts from {source.label}{_notes(report)}")


def load_teacher(name: str, teacher: nn.Module, say: Callable[[str], None]) -> None:
    """Load what `--teacher` names into the frozen teacher, and say what it was.

    Raises:
        UsageError:   there is no such file.
        WeightsError: it does not fit; lists names and shapes.
    """
    source = read_source(name)
    report = load_encoder(source.weights, teacher, name=source.label)
    say(f"teacher {source.label}{_notes(report)}")


def _notes(report: LoadReport) -> str:
    notes = [*report.notes, *(["its encoder alone"] if report.kind == "recognizer" else [])]
    return f" ({'; '.join(notes)})" if notes else ""


def versions() -> dict[str, str]:
    """Packages that a run is made with, by name; `native` is the interface of the C++ parts, if these run."""
    versions = {"lmim_fast": lmim_fast.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if (module := native()) is not None:
        versions["native"] = str(module.interface)
    return versions
