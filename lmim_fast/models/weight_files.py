"""A file of weights as the tensors in it, by its content and not by its name; what is no such file is named.

Only tensors and argparse.Namespace are ever unpickled.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shlex
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lmim_fast.errors import WeightsError

_HEAD = 4096  # bytes that tell what a file is
_NAMED = 5  # members of an archive, or objects, that a message lists
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
# First bytes of files that are taken for weights, what they are, and what to do.
_FOREIGN = (
    (
        b"version https://git-lfs",
        "a git LFS pointer, the weights are still on the server",
        "run `git lfs pull`",
    ),
    (b"\x1f\x8b", "compressed by gzip", "unpack it with `gunzip` (or `tar xzf`) and name what comes out"),
    (b"BZh", "compressed by bzip2", "unpack it with `bunzip2` (or `tar xjf`) and name what comes out"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it with `unxz` (or `tar xJf`) and name what comes out"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with `unzstd` and name what comes out"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it and name the weights in it"),
    (b"Rar!", "a RAR archive", "unpack it and name the weights in it"),
    (b"\x93NUMPY", "a NumPy array", "save the state dict of the model with torch.save"),
    (b"\x89HDF", "an HDF5 file (Keras, TensorFlow)", "export the weights to PyTorch first"),
    (b"GGUF", "a GGUF file", "take the PyTorch weights that it was made from"),
)
_FOREIGN_SUFFIXES = {
    ".onnx": ("an ONNX model", "take the PyTorch weights that it was exported from"),
    ".pb": ("a TensorFlow or ONNX graph", "export its weights to PyTorch first"),
    ".index": ("the index of a TensorFlow checkpoint", "export its weights to PyTorch first"),
    ".data-00000-of-00001": ("a TensorFlow checkpoint", "export its weights to PyTorch first"),
    ".tflite": ("a TensorFlow Lite model", "take the PyTorch weights that it was made from"),
    ".msgpack": ("a Flax checkpoint", "export its weights to PyTorch first"),
}
_STEP = "lmim_fast.step"  # entry of the metadata of what a run exports
_AGAIN = "copy or download it again"
# Keeps tensors and what holds them by name; None is what the reader passes over.
_SAVE_ALONE = (
    "import torch; keep = lambda x: keep(x.state_dict()) if hasattr(x, 'state_dict') else "
    "{{str(k): keep(v) for k, v in x.items()}} if hasattr(x, 'items') else "
    "x.detach().clone() if isinstance(x, torch.Tensor) else None; "
    "torch.save(keep(torch.load({source!r}, map_location='cpu', weights_only=False)), {target!r})"
)


def read_content(path: Path) -> Mapping[Any, Any]:
    """What a file of `torch.save` or safetensors holds, whatever its name ends in.

    Raises:
        WeightsError: there is no such file, it cannot be read, or it is something else; says what it is.
    """
    try:
        if not path.is_file():
            told = (
                f"{path} is no file: name a file of weights"
                if path.exists()
                else f"no checkpoint file {path}"
            )
            raise WeightsError(told)
        with path.open("rb") as file:
            head = file.read(_HEAD)
        size = path.stat().st_size
        if is_safetensors(path):
            return _read_safetensors(path, head, size)
        if (kind := _foreign(path, head, size)) is not None:
            raise WeightsError(f"{path} {kind}")
        content = _read_index(path) if _is_text(head) else _read_pickle(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors does: the length of a header, then the header."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _LONGEST_HEADER


def with_step(content: bytes, step: int) -> bytes:
    """The bytes of a safetensors file whose metadata says after how many steps of a run it was written."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    # Not by safetensors itself, which writes several entries in an order that changes from time to time.
    header["__metadata__"] = {**header.get("__metadata__", {}), _STEP: str(step)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


def step_of(path: Path) -> int | None:
    """The step that `with_step` put into a file; None of any other file."""
    from safetensors import SafetensorError, safe_open

    if not is_safetensors(path):
        return None
    try:
        with safe_open(path, "pt") as file:
            step = (file.metadata() or {}).get(_STEP, "")
    except SafetensorError:  # whoever reads the tensors says what is wrong
        return None
    return int(step) if step.isdecimal() else None


def _read_safetensors(path: Path, head: bytes, size: int) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        header = int.from_bytes(head[:8], "little")
        try:
            lines = json.loads(path.read_bytes()[8 : 8 + header])
            end = max(line["data_offsets"][1] for name, line in lines.items() if name != "__metadata__")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            end = 0 if header + 8 <= size else None
        if end is None or 8 + header + end > size:
            whole = f"{8 + (end or 0) + header:,}" if end is not None else f"more than {8 + header:,}"
            told = f"{path} is a safetensors file that was cut short ({size:,} bytes of {whole}): {_AGAIN}"
            raise WeightsError(told) from error
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def _read_index(path: Path) -> dict[str, Any]:
    """The tensors of all files that the index of a sharded safetensors file names."""
    try:
        files = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        inside = all(isinstance(name, str) and Path(name).name == name for name in files)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        told = "a JSON file without a weight_map, not weights; name the .safetensors or .pth beside it"
        raise WeightsError(f"{path} is {told}") from error
    if not inside:
        raise WeightsError(f"{path} names files outside its folder; they are not read")
    tensors: dict[str, Any] = {}
    for name in files:
        part = path.with_name(name)
        if not part.is_file() or not is_safetensors(part):
            raise WeightsError(
                f"{path} is the index of weights in {len(files)} files, of which {part} is no "
                f"safetensors file here: {_AGAIN}"
            )
        tensors |= read_content(part)
    return tensors


def _read_pickle(path: Path) -> Any:
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with allowed, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what other bytes than a checkpoint's look like
            with path.open("rb") as file:  # of a path torch reads the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message advises to load it unsafely
        objects = _objects(path, str(error))
        if not objects:
            raise WeightsError(f"{path} was not read: it is no checkpoint of torch.save") from error
        if "is blocked" in str(error):
            raise WeightsError(
                f"{path} was not read: it calls {', '.join(objects)} when it is unpickled, which no "
                "checkpoint needs: do not load it with anything"
            ) from error
        target = path.with_name(f"{path.stem}-weights.pth").name
        code = _SAVE_ALONE.format(source=str(path), target=target)
        raise WeightsError(
            f"{path} was not read: it holds objects other than tensors and argparse.Namespace, which could "
            f"run code: {', '.join(objects)}; if you trust the file, save its weights alone and name "
            f"{target}: python -c {_quoted(code)}"
        ) from error
    except OSError:
        raise
    except Exception as error:  # damaged bytes are opcodes to the unpickler: any error may follow
        told = (str(error) or type(error).__name__).splitlines()[0]
        if "unexpected EOF" in told or isinstance(error, EOFError):
            raise WeightsError(
                f"{path} is a checkpoint of torch.save that was cut short: {_AGAIN}"
            ) from error
        raise WeightsError(f"{path} is not a readable checkpoint: {told}") from error


def _quoted(code: str) -> str:
    """For a shell; in double quotes, which read better, where nothing in them is special."""
    return shlex.quote(code) if re.search(r'["$`\\\\!]', code) else f'"{code}"'


def _objects(path: Path, message: str) -> list[str]:
    """Names of the classes and functions for which a file was not unpickled."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a file of the old format, or of a pickle that is no checkpoint
        names = re.findall(r"GLOBAL ([\w.]+)", message)
    names = sorted(set(names))
    return names[:_NAMED] + ([f"{len(names) - _NAMED} more"] if len(names) > _NAMED else [])


def _foreign(path: Path, head: bytes, size: int) -> str | None:
    """What a file is that is no weights, and what to do; None if it may be a checkpoint of torch.save."""
    if not size:
        return f"is empty (0 bytes): {_AGAIN}"
    for magic, kind, advice in _FOREIGN:
        if head.startswith(magic):
            return f"is {kind}: {advice}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return (
            "is a web page, not weights: the link led to a log-in, licence or preview page; open it in a "
            "browser and download the file itself"
        )
    if head.startswith(b"PK\x03\x04"):
        return _foreign_zip(path, size)
    if tarfile.is_tarfile(path):
        try:
            with tarfile.open(path) as archive:
                names = _some(archive.getnames())
        except (tarfile.TarError, EOFError, OSError) as error:
            return f"is a tar archive that was cut short ({error}): {_AGAIN}"
        return f"is a tar archive: unpack it with `tar xf` and name the weights in it ({names})"
    if path.suffix in _FOREIGN_SUFFIXES and head[:1] != b"\x80":
        return "is {}: {}".format(*_FOREIGN_SUFFIXES[path.suffix])
    if head[:1] == b"\x08" and (b"onnx" in head.lower() or b"pytorch" in head):
        return "is {}: {}".format(*_FOREIGN_SUFFIXES[".onnx"])
    if _is_text(head) and not text.startswith(b"{"):
        return f"is a text file, not weights; it begins with {head[:60].decode(errors='replace')!a}"
    return None


def _is_text(head: bytes) -> bool:
    """Whether a file's first bytes, if enough to tell, have no control codes of binary ones."""
    return len(head) > 16 and all(byte in b"\t\n\r\f" or 32 <= byte != 127 for byte in head)


def _foreign_zip(path: Path, size: int) -> str | None:
    if not zipfile.is_zipfile(path):
        return (
            f"is a checkpoint that was cut short ({size:,} bytes, without the end of its archive): {_AGAIN}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        return f"is a damaged archive ({error}): {_AGAIN}"
    if any(os.path.basename(name) == "constants.pkl" for name in names):
        return (
            "is a TorchScript program: save its weights alone with "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth'), and name that file"
        )
    if any(os.path.basename(name) == "data.pkl" for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return (
            f"is a NumPy archive ({_some(names)}): save the state dict of the PyTorch model with torch.save"
        )
    return f"is a zip archive, but not of torch.save: unpack it and name the weights in it ({_some(names)})"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(ascii(name)[1:-1] for name in names[:_NAMED]) + more if names else "nothing is in it"
