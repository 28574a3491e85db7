"""Run by test_r25_refusing_disk.py with the library of refusing_disk.py: one process, real commands."""

import contextlib
import errno
import io
import json
import os
import sys
import warnings
from pathlib import Path

from pretrain_runs import options

from lmim_fast import cli, durable

READS = {"whole": (errno.EIO, errno.EMFILE), "sharded": (errno.ESTALE, errno.EACCES)}


def run(*arguments: str, **refused: object) -> dict[str, object]:
    """One command on a disk that refuses something: its exit code and what it said."""
    names = {f"DISK_{name.upper()}": str(value) for name, value in refused.items()}
    os.environ.update(names)
    durable._told.clear()
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told), warnings.catch_warnings():
        warnings.simplefilter("always")  # Python must not be what keeps a warning from coming again
        code = cli.main(arguments)
    for name in names:
        del os.environ[name]
    return {"code": code, "out": said.getvalue(), "err": told.getvalue()}


def main(data: Path, folder: Path) -> dict[str, dict[str, object]]:
    """All situations by name."""
    done = {}
    for layout, numbers in READS.items():
        more = ("--checkpoint-layout", layout, "--checkpoint-every", "1", "--keep-checkpoints", "2")
        train = ["pretrain", *options(data, folder / layout, *more, steps=2)]
        no_flush = {"folder_fsync": errno.EINVAL} | (
            {"file_fsync": errno.ENOSYS} if layout == "sharded" else {}
        )
        done[layout] = run(*train, **no_flush)
        newest = "step-00000002/" + ("opt" if layout == "whole" else "shards/__0_0")
        for number in numbers:
            name = errno.errorcode[number]
            done[f"{layout} {name}"] = run(*train, read=f"{number} {newest}")
        where = str(folder / layout)
        done[f"{layout} convert"] = run("convert", where, "x.pth", read=f"{errno.EIO} {newest}")
        done[f"{layout} again"] = run(*train)
    run_folder = str(folder / "whole")
    done["convert"] = run("convert", run_folder, str(folder / "a.pth"), folder_fsync=errno.ENOTSUP)
    done["not opened"] = run("convert", run_folder, str(folder / "b.pth"), folder_open=errno.EACCES)
    done["failing"] = run("convert", run_folder, str(folder / "c.pth"), folder_fsync=errno.EIO)
    render = ("data", "render", "--count", "4", "--processes", "1", "--output", str(folder / "crops"))
    done["render"] = run(*render, folder_fsync=errno.EINVAL)
    return done


if __name__ == "__main__":
    data, folder = map(Path, sys.argv[1:])
    (folder / "done.json").write_text(json.dumps(main(data, folder)))
