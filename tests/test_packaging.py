"""What is shipped: a checkout that imports as it is, a wheel, a source distribution."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "kernels", "lmim_fast")
FILES = ("LICENSE", "README.md", "pyproject.toml", "setup.py")
BUILD = "from setuptools import build_meta; build_meta.build_{what}({output!r})"


def checkout(folder: Path) -> Path:
    """A copy of what packages are built from, links as links, without what a build or a run leaves."""
    folder.mkdir()
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def run(code: str, folder: Path, *path: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_kernels_are_one_folder_that_a_checkout_imports_without_an_installation(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "checkout")
    assert os.readlink(folder / "lmim_fast/kernels") == "../kernels"
    assert not [path for path in (folder / "kernels").iterdir() if path.is_symlink()]
    code = "import lmim_fast.kernels.runtime as module; print(module.__file__)"
    result = forked.run("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(folder)})
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{folder}/lmim_fast/kernels/runtime.py\n"


def expected(folder: Path) -> set[str]:
    """Every file of the package but the compiled one."""
    modules = {path.relative_to(folder) for path in (folder / "lmim_fast").rglob("*.py")}
    modules |= {Path("lmim_fast") / path.relative_to(folder) for path in (folder / "kernels").glob("*.py")}
    return {str(path) for path in modules} | {"lmim_fast/py.typed", "lmim_fast/data/render/words.txt"}


@pytest.mark.slow
def test_wheel_and_source_distribution_have_each_file_of_the_package_once(tmp_path: Path) -> None:
    """Both are built by setuptools in a folder of its own; a compiler and a package index are needed."""
    tools, built = tmp_path / "tools", tmp_path / "built"
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tools), *required]
    subprocess.run(pip, check=True)
    folder = checkout(tmp_path / "checkout")
    package = expected(folder)
    for what in ("sdist", "wheel"):
        run(BUILD.format(what=what, output=str(built)), folder, tools)
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")

    with tarfile.open(archive) as source:
        members = [member for member in source if not member.isdir()]
        assert [member.name for member in members if not member.isfile()] == []
        shipped = [member.name.partition("/")[2] for member in members]
        source.extractall(tmp_path / "unpacked", filter="data")
    assert len(shipped) == len(set(shipped))
    assert {name for name in shipped if name.startswith(("lmim_fast/", "kernels/"))} == package
    assert {name for name in shipped if name.startswith("csrc/")} == {
        str(path.relative_to(folder)) for path in (folder / "csrc").iterdir()
    }

    (unpacked,) = (tmp_path / "unpacked").iterdir()
    run(BUILD.format(what="wheel", output=str(tmp_path / "rebuilt")), unpacked, tools)
    (rebuilt,) = (tmp_path / "rebuilt").glob("*.whl")
    lists = []
    for path in (wheel, rebuilt):
        with zipfile.ZipFile(path) as content:
            lists.append(sorted(content.namelist()))
    assert lists[0] == lists[1]
    contents = [name for name in lists[0] if ".dist-info/" not in name]
    native = [name for name in contents if name.startswith("lmim_fast/_C.")]
    assert (len(native), sorted(package)) == (1, [name for name in contents if name not in native])

    target = tmp_path / "installed"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    code = "import lmim_fast._C, lmim_fast.kernels.attention as module; print(module.__file__)"
    assert run(code, tmp_path, target) == f"{target}/lmim_fast/kernels/attention.py\n"
