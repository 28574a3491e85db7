"""R5: what a checkpoint of a real run says of itself, and that it is on the disk before it has its name."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from pretrain_runs import options, write_lmdb

from lmim_fast import cli
from lmim_fast.config.io import config_hash, run_from_dict


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lmdb(tmp_path_factory.mktemp("data") / "words", 10)


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_r05_every_file_is_flushed_before_the_folder_gets_its_name_and_the_manifest_lists_it(
    data, tmp_path, monkeypatch, layout
):
    seen, fsync, rename = [], os.fsync, Path.rename
    checkpoints = tmp_path / "run" / "checkpoints"

    def flushed(descriptor):
        seen.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def named(path, target):
        if path.parent == checkpoints:
            seen.append((path.name, target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", named)
    more = ("--checkpoint-layout", layout)
    assert cli.main(["pretrain", *options(data, tmp_path / "run", *more, steps=2)]) == 0

    final, temporary = checkpoints / "step-00000002", checkpoints / "step-00000002.tmp"
    publication = seen.index((temporary.name, final.name))
    state = json.loads((final / "state.json").read_text())
    files = {str(path.relative_to(final)) for path in final.rglob("*") if path.is_file()}
    assert files == {"state.json", *state["files"]}
    flushes = set(seen[:publication])
    for name in files:
        path = temporary / name
        # DCP flushes its index under the first name and gives it the second.
        assert flushes & {path, path.with_name(f"{path.name}.tmp")}, name
        assert path.parent in flushes, path.parent
    assert checkpoints in seen[publication:], "the name itself would not last through a power cut"

    for name, line in state["files"].items():
        content = (final / name).read_bytes()
        assert line == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert state["step"] == 2
    assert state["config_hash"] == config_hash(run_from_dict(state["config"]))
    assert state["versions"]["torch"] == torch.__version__
    assert state["data"]["count"] == 10
