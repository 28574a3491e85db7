"""Tensors that several processes write and read, each its own part, by torch.distributed.checkpoint (DCP).

A save has the steps of `dcp.save`, on messages that the caller sends: so a failure keeps its own words, and
one process needs no process group. A load needs no messages: each process reads its own part of the files.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    Metadata,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from lmim_fast import durable
from lmim_fast.errors import CheckpointError
from lmim_fast.train.checkpoint.files import reading

INDEX = ".metadata"
# All that the index, a pickle, is made of. Nothing else is unpickled, so a foreign one runs no code.
_INDEX_PARTS = {
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # of Python 3.13
}


class ShardWriter(DefaultSavePlanner):
    """One process's part of a sharded save: `propose`, then `write`, then on rank 0 `finish`.

    Args:
        folder: where the files go; rank 0 makes it before `write`.
        live:   the tensors, sharded or not, by name; only their sizes and shardings are read.
        host:   this process's part of each, in host memory.
    """

    def __init__(self, folder: Path, live: Mapping[str, Tensor], host: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._live, self._host, self._folder = dict(live), host, folder
        # No copies ahead: they are for tensors on a device, and wait for its current stream. Files are
        # flushed in `write`: DCP fails on a file system that cannot flush.
        self._writer = FileSystemWriter(folder, per_thread_copy_ahead=0, sync_files=False)

    def propose(self) -> SavePlan:
        """What this process could write."""
        self.set_up_planner(self._live)
        return self.create_local_plan()

    def write(self, plans: list[SavePlan], rank: int) -> tuple[list[WriteResult], Metadata, list[Path]]:
        """Write this process's share, through to the disk.

        Args:
            plans: what all processes propose, by rank.
        Returns:
            what was written, for `finish`; the index so far; the files written.
        """
        chosen, metadata = self.create_global_plan(plans)  # the same on every rank
        mine = self.finish_plan(self._writer.prepare_global_plan(chosen)[rank])
        results = self._writer.write_data(mine, self).wait()
        paths = sorted(self._folder.glob(f"__{rank}_*"))
        for path in paths:
            durable.flush_named(path)
        return results, metadata, paths

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> Path:
        """Write the index, from the `results` of all processes; its file."""
        self._writer.finish(metadata, results)
        durable.flush_named(self._folder / INDEX)
        durable.flush_folder(self._folder)
        return self._folder / INDEX

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The host's copy of a tensor's part; called by DCP."""
        return self._host[index.fqn]


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_PARTS or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in an index")


def _read_index(file: IO[bytes], path: Path) -> Metadata:
    try:
        metadata = _IndexUnpickler(file).load()
    except Exception as error:  # damaged bytes are opcodes to the unpickler: any error may follow
        raise CheckpointError(f"{path} is not an index of shards: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} is not an index of shards: it holds a {type(metadata).__name__}")
    return metadata


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / INDEX
        with reading(path), path.open("rb") as file:
            metadata = _read_index(file, path)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        names = {place.relative_path for place in metadata.storage_data.values()}
        foreign = sorted(name for name in names if Path(name).name != name)
        if foreign:
            raise CheckpointError(f"{path} names files of other folders: {', '.join(foreign)}")
        return metadata


def sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor in a folder of shards, by name.

    Raises:
        CheckpointError: the index is missing or is none.
        LmimError: it cannot be read.
    """
    entries = _Reader(folder).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets`, each of its saved shape, in place; of a sharded one the part of this process.

    Raises:
        CheckpointError: a file is missing.
        LmimError: a file cannot be read.
    """
    reader = _Reader(folder)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    with reading(folder):
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of shards, whole and in host memory.

    Raises:
        CheckpointError, LmimError: as of `load`.
    """
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sizes(folder).items()}
    load(folder, tensors)
    return tensors
