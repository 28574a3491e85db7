"""The compiler of `--compile`: torch.compile would miss it at the first step only, with a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

from lmim_fast.errors import UsageError

_SOURCE = "#include <Python.h>\nint lmim_fast_probe(void) { return PY_MAJOR_VERSION; }\n"


def require_compiler(device: torch.device) -> None:
    """Build what torch.compile builds with: a shared object with Python's headers, in C++ on a CPU.

    On CUDA it is C, for Triton.

    Raises:
        UsageError: there is no compiler, or it does not work; says what to install.
    """
    if device.type == "cuda":
        language, suffix, variable, packages = "C", "c", "CC", "apt install gcc, dnf install gcc"
        name = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "gcc"
        flags = []
    else:
        language, suffix, variable, packages = "C++", "cpp", "CXX", "apt install g++, dnf install gcc-c++"
        name = os.environ.get("CXX", "g++")
        flags = ["-fopenmp"]
    reason = _failure(name, suffix, flags)
    if "Python.h" in reason:
        advice = "install Python's headers (apt install python3-dev, dnf install python3-devel)"
    else:
        advice = f"install one ({packages}), or name one that works: {variable}=/path/to/compiler"
    if reason:
        raise UsageError(
            f"--compile needs a {language} compiler, and {name!r} does not work: {reason}; {advice}, "
            "or drop --compile"
        )


def _failure(compiler: str, suffix: str, flags: list[str]) -> str:
    """Why a small file cannot be built; "" where it can."""
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, f"probe.{suffix}"), Path(folder, "probe.so")
        source.write_text(_SOURCE)
        include = sysconfig.get_paths()["include"]
        command = [compiler, "-shared", "-fPIC", *flags, f"-I{include}", str(source), "-o", str(built)]
        try:
            ended = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                env=os.environ | {"LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            return f"it cannot be started ({error.strerror})"
        if ended.returncode:
            said = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
            line = (said or ended.stderr.splitlines()[-1:] or ["it says nothing"])[0]
            return f"exit code {ended.returncode}, {line.replace(str(source), source.name)}"
        return "" if built.is_file() else "it wrote no file"
