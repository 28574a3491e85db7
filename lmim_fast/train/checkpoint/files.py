"""Files that are whole or absent, and reads that are checked against a size and a checksum."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmim_fast import durable
from lmim_fast.errors import CheckpointError, LmimError

# The types of tensors that are written, in the order in which the safetensors format stores them.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 8 * 2**20  # bytes that are hashed and written at a time: long enough to leave Python to others


def explain(error: OSError, path: Path) -> LmimError:
    """What a failed write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LmimError(f"disk full while writing {path}: free some space and run the same command again")
    reason = error.strerror or str(error)
    if error.filename and Path(error.filename) not in (path, path.parent):
        reason += f" ({error.filename})"  # what is in the way may be a temporary name
    return LmimError(f"cannot write {path}: {reason}; mend that and run the same command again")


def explained(failure: Exception, path: Path) -> Exception:
    """The failure of a write as the user should see it: explained, if the system caused it."""
    cause: BaseException | None = failure
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__  # of torch.save: it hides what its file raised
    return failure if cause is None or isinstance(failure, LmimError) else explain(cause, path)


def _write_parts(path: Path, parts: Iterable[memoryview]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with durable.create(path) as file:
        for part in parts:
            for start in range(0, len(part), _CHUNK):
                chunk = part[start : start + _CHUNK]
                file.write(chunk)
                digest.update(chunk)
            size += len(part)
        file.flush()
        durable.flush_file(file.fileno(), path)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_flushed(path: Path, content: bytes) -> dict[str, Any]:
    """Write one file through to the disk; its line of a manifest."""
    return _write_parts(path, [memoryview(content)])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file through to the disk; its line of a manifest.

    The same bytes as `safetensors.torch.save` makes, from the tensors' own memory and not from a copy.

    Args:
        tensors: contiguous, in host memory.
    Raises:
        OSError: of the disk.
        CheckpointError: a type of tensor that is not written; names it.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: tensors of {tensor.dtype} are not written, but {name} is one")
    order = {dtype: place for place, dtype in enumerate(_DTYPES)}
    names = sorted(tensors, key=lambda name: (order[tensors[name].dtype], name))
    lines, end = {}, 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        lines[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(lines, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    body = (tensors[name].reshape(-1).view(torch.uint8).numpy().data for name in names)
    return _write_parts(path, [memoryview(len(header).to_bytes(8, "little") + header), *body])


def describe(path: Path) -> dict[str, Any]:
    """The line of a manifest of a file that is on the disk."""
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": checksum}


def write_file(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file so that it is whole or absent; its line of a manifest.

    Raises:
        LmimError: the disk is full or the path cannot be written; an older file of that name is untouched.
    """
    try:
        durable.write_file(path, content)
    except OSError as error:
        raise explain(error, path) from error
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """A block that reads a file of a checkpoint.

    Raises:
        CheckpointError: there is no such file.
        LmimError: it cannot be read, which says nothing of what it holds.
    """
    try:
        yield
    except MemoryError as error:
        raise _no_memory(path) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how torch says it of host memory
            raise
        raise _no_memory(path) from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise _no_memory(path) from error
        files = error.errno in (errno.EMFILE, errno.ENFILE)
        mend = "raise the limit of open files (ulimit -n)" if files else "mend the disk or the permissions"
        raise LmimError(
            f"cannot read {path}: {error.strerror or error}; it may be whole, so it stays as it is: "
            f"{mend} and run the same command again"
        ) from error


def _no_memory(path: Path) -> LmimError:
    return LmimError(
        f"not enough host memory to read {path}, which stays as it is: free some, or run where there is more"
    )


def check_file(path: Path, line: dict[str, Any]) -> None:
    """Check a file, a piece at a time, against its line of a manifest.

    Raises:
        CheckpointError: it is missing, truncated or altered.
        LmimError: it cannot be read.
    """
    with reading(path):
        found = describe(path)
    _compare(path, line, found["bytes"], found["sha256"])


def read_checked(path: Path, line: dict[str, Any]) -> bytes:
    """A file's bytes, which are the ones its manifest line was made of.

    Raises:
        CheckpointError: it is missing, truncated or altered.
        LmimError: it cannot be read.
    """
    with reading(path):
        content = path.read_bytes()
    _compare(path, line, len(content), hashlib.sha256(content).hexdigest())
    return content


def _compare(path: Path, line: dict[str, Any], size: int, checksum: str) -> None:
    if size != line["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes, its manifest says {line['bytes']}")
    if checksum != line["sha256"]:
        raise CheckpointError(f"{path} was altered: its checksum is not the manifest's")
