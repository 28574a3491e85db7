"""Processes that begin with torch imported: forks of one that waits, since the import takes seconds.

For programs that need a process of their own (environment, modules, exit code), not for tests of imports.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
_server: subprocess.Popen[str] | None = None


def run(
    *command: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ...`, `python -c CODE ...` or `python FILE ...` in a fork, to its end."""
    server = _started()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        request = dict(command=command, cwd=str(cwd), files=[*map(str, files)])
        request |= dict(env=dict(os.environ if env is None else env))
        print(json.dumps(request), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, code, *(file.read_text("utf-8") for file in files))


def _started() -> subprocess.Popen[str]:
    global _server
    if _server is None:
        _server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(_end, _server)
    return _server


def _end(server: subprocess.Popen[str]) -> None:
    """It ends with its input."""
    server.communicate()


def _next_fork() -> list[str] | None:
    """In a fork: its command, with all else as it was asked for. In the server: None, at the end."""
    import torch  # noqa: F401  for the forks

    assert not {"triton", "lmim_fast"} & {*sys.modules}  # they look at the environment of the fork
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if not (child := os.fork()):
            for number, name in enumerate(request["files"], 1):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["env"])
            places = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
            sys.path[0:1] = [request["cwd"], *places]
            command: list[str] = request["command"]
            return command
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    return None


def _run(command: list[str]) -> None:
    """As Python does it: the program ends, or fails, in the frame of the main module."""
    import runpy
    import types

    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__" and (command := _next_fork()):
    _run(command)
