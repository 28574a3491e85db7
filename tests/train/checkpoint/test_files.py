import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lmim_fast.errors import CheckpointError, LmimError
from lmim_fast.train.checkpoint import files


def test_a_file_of_tensors_has_the_bytes_that_the_library_of_its_format_writes(tmp_path):
    tensors = {
        f"{name}.{dtype}".replace("torch.", ""): (torch.arange(5 * size) % 2).to(dtype).view(5, size)
        for dtype in files._DTYPES
        for name, size in (("b", 3), ("a", 1), ("empty", 0))
    }
    tensors |= {"step": torch.tensor(7.0), "Ä": torch.randn(2, 1, 3)}
    line = files.write_tensors(tmp_path / "x.safetensors", tensors)
    assert (tmp_path / "x.safetensors").read_bytes() == safetensors.torch.save(tensors)
    files.check_file(tmp_path / "x.safetensors", line)
    assert files.describe(tmp_path / "x.safetensors") == line
    files.write_tensors(tmp_path / "none", {})
    assert (tmp_path / "none").read_bytes() == safetensors.torch.save({})


def test_a_type_that_cannot_be_written_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"complex64.*spectrum"):
        files.write_tensors(tmp_path / "x", {"spectrum": torch.zeros(2, dtype=torch.complex64)})


def test_a_large_file_is_written_and_hashed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 1000)
    tensors = {"a": torch.randn(1234), "b": torch.randn(77)}
    line = files.write_tensors(tmp_path / "x", tensors)
    assert (tmp_path / "x").read_bytes() == safetensors.torch.save(tensors)
    files.read_checked(tmp_path / "x", line)


@pytest.mark.parametrize("check", [files.check_file, files.read_checked])
@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EIO, LmimError, "cannot read .*x.*may be whole"),
        (errno.EACCES, LmimError, "cannot read .*x.*may be whole"),
        (errno.EMFILE, LmimError, "cannot read .*x.*may be whole.*ulimit -n"),
        (errno.ENOMEM, LmimError, "not enough host memory to read .*x, which stays as it is"),
        (errno.ENOENT, CheckpointError, "x: No such file"),
    ],
)
def test_what_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, check, number, kind, message):
    line = files.write_flushed(tmp_path / "x", b"content")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(LmimError, match=message) as caught:
        check(tmp_path / "x", line)
    assert type(caught.value) is kind


def test_a_full_disk_is_seen_through_a_failure_that_hides_it(tmp_path):
    hiding = RuntimeError("unexpected pos 704 vs 598")  # as torch.save does
    hiding.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert str(files.explained(hiding, tmp_path / "x")).startswith("disk full while writing")
    other = RuntimeError("a bug")
    assert files.explained(other, tmp_path) is other
