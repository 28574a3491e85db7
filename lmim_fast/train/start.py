"""What a run starts from: the files that `--teacher` and `--init` name, and the versions it is made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import nn

import lmim_fast
from lmim_fast.config import RunConfig
from lmim_fast.errors import DataError, UsageError
from lmim_fast.models.weights import LoadReport, load_encoder
from lmim_fast.native import native
from lmim_fast.train.run_weights import read_source

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
