"""What a run starts from: the files that `--teacher` and `--init` name, and the versions it is made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

import lmim_fast
from lmim_fast.config import RunConfig
from lmim_fast.errors import DataError, UsageError
from lmim_fast.models import weights
from lmim_fast.native import native
from lmim_fast.train.checkpoint import folders

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


def encoder_file(name: str) -> Path:
    """The file of an encoder: the one named, or of a run folder its encoder, or else its newest checkpoint.

    Raises:
        UsageError: there is no such file, or the folder holds neither.
    """
    path = Path(name)
    if not path.exists():
        raise UsageError(f"{name} does not exist; it should be an encoder file or a run folder")
    if path.is_file():
        return path
    if (path / "encoder.safetensors").is_file():
        return path / "encoder.safetensors"
    latest = folders.latest(path)
    if latest is None:
        raise UsageError(
            f"{name} has no encoder.safetensors and no checkpoint: it is not the folder of a run"
        )
    return folders.weights_file(latest)


def load_student(name: str, encoder: nn.Module) -> None:
    """Load what `--init` names into the encoder that is trained; its position table stays.

    Raises:
        UsageError:   there is no such file.
        WeightsError: it does not fit; lists names and shapes.
    """
    weights.load_encoder(encoder_file(name), encoder, keep_positions=True)


def load_teacher(name: str, teacher: nn.Module) -> Path:
    """Load what `--teacher` names into the frozen teacher; the file it was.

    Raises:
        UsageError:   there is no such file.
        WeightsError: it does not fit; lists names and shapes.
    """
    path = encoder_file(name)
    weights.load_encoder(path, teacher)
    return path


def versions() -> dict[str, str]:
    """Packages that a run is made with, by name; `native` is the interface of the C++ parts, if these run."""
    versions = {"lmim_fast": lmim_fast.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if (module := native()) is not None:
        versions["native"] = str(module.interface)
    return versions
